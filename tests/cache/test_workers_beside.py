"""Stages and ranks whose heads share the pool with layers of other kinds.

vLLM's planning for 2 pipeline stages x 2 tensor-parallel ranks, on 0.32 and 0.33.
"""

import random
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import KVCacheLayout, MambaSpec, SlidingWindowSpec

from tests.helpers.workers import FULL, RANKS, Model, full_spec, kinds_of, plan, spec_of
from vllm_sink.cache import layers_beside
from vllm_sink.cache.head_slots import HeadSlot
from vllm_sink.cache.spec import OwnWindowSpec, RetrievalSpec, SinkSpec

SLIDING, LINEAR = "sliding_attention", "linear_attention"
LAYOUTS = [KVCacheLayout.LBHNC, KVCacheLayout.BLHNC]


def windowed(window: int, kinds: list[str], kv_heads: int) -> Model:
    full = full_spec(kv_heads // RANKS)
    shape = dict(block_size=16, head_size=64, dtype=torch.float32)
    own = SlidingWindowSpec(
        num_kv_heads=kv_heads // RANKS, sliding_window=window, **shape
    )
    return Model(tuple(kinds), {FULL: full, SLIDING: own}, kv_heads)


def qwen_next() -> Model:
    """Three layers of four have a state that makes blocks large."""
    full = full_spec(1, block_size=544)
    page = full.page_size_bytes
    state = MambaSpec(
        block_size=544,
        shapes=((page // 4 - 40,),),
        dtypes=(torch.float32,),
        page_size_padded=page,
    )
    kinds = [LINEAR, LINEAR, LINEAR, FULL] * 5
    return Model(tuple(kinds), {FULL: full, LINEAR: state}, 2)


MODELS = {  # governed layers of the two stages: 1 and 2, 2 and 3, 2 and 3
    "gemma-3": windowed(1024, [*[SLIDING] * 5, FULL] * 3, 4),
    "gpt-oss": windowed(128, [SLIDING, FULL] * 5, 8),
    "qwen3-next": qwen_next(),
}


def uneven(model: Model, seed: int = 1) -> list[list[int]]:
    """Rows of the governed layers: more heads on the first than on the others."""
    rng = random.Random(seed)
    rows = [[0] * model.kv_heads for kind in model.kinds if kind == FULL]
    rows[0] = [1] * (model.kv_heads - 1) + [0]
    rows[-1][rng.randrange(model.kv_heads)] = 1
    return rows


def slots_of(config, context) -> dict[str, HeadSlot]:
    names = [name for group in config.kv_cache_groups for name in group.layer_names]
    assert len(names) == len(set(names))
    return {x: context[x] for x in names if isinstance(context[x], HeadSlot)}


def check_workers(configs, contexts, engines) -> None:
    """All have the groups that were planned, and each head a place in its kind's."""
    found = {
        str(engine.head_groups.plan(engine.vllm_config).grouping) for engine in engines
    }
    assert len(found) == 1, found
    for config, context, engine in zip(configs, contexts, engines, strict=True):
        groups = engine.head_groups
        memory = groups.plan(engine.vllm_config)
        grouping = memory.grouping
        assert kinds_of(config) == kinds_of(configs[0])
        assert len(config.kv_cache_groups) == grouping.num_groups
        slots = slots_of(config, context)
        for group in config.kv_cache_groups:
            kind = type(spec_of(group))
            if kind in (RetrievalSpec, SinkSpec):
                assert len(group.layer_names) == grouping.size
                own = [slots[name] for name in group.layer_names]
                assert {x.is_retrieval for x in own} == {kind is RetrievalSpec}
        pages = max(len(group.layer_names) for group in config.kv_cache_groups)
        assert pages * memory.page_bytes == memory.pool_block_bytes
        heads = [head for slot in slots.values() for head in slot.heads]
        wanted = [x for layer in groups.layers for x in layer.impl.heads]
        wanted += [x for layer in groups.drafters for x in layer.impl.heads]
        assert sorted(map(id, heads)) == sorted(map(id, wanted))
        for slot in slots.values():
            assert [head.place for head in slot.heads] == list(range(len(slot.heads)))
            assert all(head.slot is slot for head in slot.heads)
            assert all(x.is_retrieval == slot.is_retrieval for x in slot.heads)
        rank_heads = groups.held.counts
        kinds = [x.is_retrieval for x in wanted]
        assert rank_heads == (sum(kinds), len(kinds) - sum(kinds))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_one_policy_for_all(monkeypatch, name, layout):
    model = MODELS[name]
    configs, _, _ = plan(monkeypatch, model, None, layout=layout)
    other = OwnWindowSpec if SLIDING in model.kinds else MambaSpec
    for config in configs:
        assert set(kinds_of(config)) == {SinkSpec, other}
        assert kinds_of(config) == kinds_of(configs[0])
        for group in config.kv_cache_groups:
            indices = [int(x.split(".")[2]) for x in group.layer_names]
            kinds = {model.kinds[i] for i in indices}
            assert kinds <= {
                FULL
                if type(spec_of(group)) is SinkSpec
                else next(k for k in model.specs if k != FULL)
            }


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_uneven_stages(monkeypatch, name, layout):
    model = MODELS[name]
    made = plan(monkeypatch, model, uneven(model), layout=layout)
    check_workers(*made)
    counts = [engine.head_groups.held.counts for engine in made[2]]
    assert len(set(counts)) > 2, counts


@pytest.mark.parametrize("name", MODELS)
def test_whole_layers(monkeypatch, name):
    """Stages hold heads in slots, whether or not a layer is split."""
    model = MODELS[name]
    rows = [[i == 1] * model.kv_heads for i in range(model.kinds.count(FULL))]
    check_workers(*plan(monkeypatch, model, rows))


@pytest.mark.parametrize("method, kind", [("eagle3", SinkSpec), ("mtp", RetrievalSpec)])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_a_drafter_is_in_one_group(monkeypatch, name, layers, method, kind):
    model = MODELS[name]
    made = plan(monkeypatch, model, uneven(model), method, layers)
    check_workers(*made)
    for config, context, engine in list(zip(*made, strict=True))[-RANKS:]:
        drafters = engine.head_groups.drafters
        assert [x.layer_name for x in drafters] == [
            f"draft.{i}.attn" for i in range(layers)
        ]
        found = [
            group
            for group in config.kv_cache_groups
            if any(context[x].is_draft_layer for x in group.layer_names)
        ]
        (group,) = found
        assert type(spec_of(group)) is kind
        targets = {layer.kv_sharing_target_layer_name for layer in drafters}
        assert targets <= set(group.layer_names)
        if method == "mtp":  # vLLM finds its group by the last entry of all
            flags = [x.is_eagle_group for x in config.kv_cache_groups]
            assert flags == [x is group for x in config.kv_cache_groups]


def test_layers_of_one_kind_that_differ_are_refused():
    """One of two sliding layers has the window: who knows of those elsewhere?"""
    kinds = [FULL, SLIDING, SLIDING, FULL, SLIDING, SLIDING, SLIDING]
    text = SimpleNamespace(layer_types=kinds)
    config = SimpleNamespace(model_config=SimpleNamespace(hf_text_config=text))
    stages = [range(3), range(3, 7)]
    names = ["model.layers.1.attn", "model.layers.2.attn"]
    assert layers_beside.on_stages(config, names, stages, 0) == (2, 3)
    message = "must be 1 .* got 1 like model.layers.1.attn among 2 .* use tensor"
    with pytest.raises(ValueError, match=message):
        layers_beside.on_stages(config, names[:1], stages, 0)
