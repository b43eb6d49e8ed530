"""vLLM's planning for 2 pipeline stages x 2 tensor-parallel ranks, on 0.32 and 0.33."""

import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheLayout,
    UniformTypeKVCacheSpecs,
)

from tests.helpers.refusals import drafter, stub_engine
from vllm_sink.attention import backend
from vllm_sink.cache import draft_heads, head_caches, workers
from vllm_sink.cache.spec import RetrievalSpec, SinkSpec
from vllm_sink.plugin import compat

try:  # vLLM 0.33
    from vllm.v1.core import kv_cache_planning as planning
except ImportError:
    planning = kv_cache_utils

STAGES = RANKS = 2
LAYERS, KV_HEADS = 6, 4
FULL = FullAttentionSpec(
    block_size=16, num_kv_heads=KV_HEADS // RANKS, head_size=64, dtype=torch.float32
)
# Retrieval heads of the four workers: 5, 1, 0 and 2 of 6.
UNEVEN = [
    [1, 1, 0, 0],
    [1, 1, 0, 1],
    [1, 0, 0, 0],
    [0, 0, 1, 0],
    [0, 0, 0, 0],
    [0, 0, 0, 1],
]
WHOLE = [[i in (0, 1, 4)] * KV_HEADS for i in range(LAYERS)]


class Layer(Attention):
    """What the plugin and vLLM's planning read of an attention layer."""

    def __init__(self, name: str, spec: FullAttentionSpec) -> None:
        torch.nn.Module.__init__(self)
        self.layer_name, self.spec = name, spec
        self.attn_backend = backend.SinkBackend
        self.sliding_window = self.kv_sharing_target_layer_name = None
        self.num_heads, self.num_kv_heads = 8, spec.num_kv_heads
        self.impl = SimpleNamespace(heads=None)

    def get_kv_cache_spec(self, vllm_config):
        return self.spec


def engine_of(heads, method, layers, kv_heads):
    speculative = None
    if method is not None:
        model = SimpleNamespace(
            get_total_num_hidden_layers=lambda: layers,
            get_total_num_kv_heads=lambda: kv_heads,
        )
        speculative = drafter(
            method,
            draft_model_config=model,
            use_eagle=lambda: True,
            use_eagle_block_drop=lambda: True,
        )
    section = {"num_sink_tokens": 4, "window_size": 60}
    if heads is not None:
        section["retrieval_heads"] = [list(map(int, layer)) for layer in heads]
    changes = {
        "hf_config": SimpleNamespace(model_type="llama"),
        "hf_text_config": SimpleNamespace(num_attention_heads=16),
        "get_total_num_hidden_layers": lambda: LAYERS,
        "get_total_num_kv_heads": lambda: KV_HEADS,
        "original_max_model_len": 4096,
        "supports_kv_cache_grouping": False,
    }
    engine = stub_engine(
        additional_config={"sink": section},
        speculative_config=speculative,
        **{f"model_config__{name}": value for name, value in changes.items()},
    )
    config = engine.vllm_config
    vars(config.parallel_config).update(
        pipeline_parallel_size=STAGES, tensor_parallel_size=RANKS
    )
    vars(config.cache_config).update(
        num_gpu_blocks_override=None,
        prefix_cache_retention_interval=None,
        get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBHNC,
    )
    config.attention_config.hisparse_config = None
    config.num_prefill_lookahead_tokens = 0
    config.max_in_flight_tokens = 128
    return engine


def specs_of(monkeypatch, stage, rank, heads, method=None, layers=1, kv_heads=KV_HEADS):
    """(specs as a worker gives them to vLLM, its configuration, its context)."""
    engine = engine_of(heads, method, layers, kv_heads)
    config = engine.vllm_config
    context = config.compilation_config.static_forward_context
    for module in (head_caches, draft_heads):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_current_vllm_config", lambda: config)
    monkeypatch.setattr(
        head_caches, "get_pp_group", lambda: SimpleNamespace(rank_in_group=stage)
    )
    building = [config]
    monkeypatch.setattr(workers, "get_current_vllm_config", lambda: building[0])

    def build(name: str, spec: FullAttentionSpec) -> None:
        context[name] = Layer(name, spec)
        backend.place_layer(engine, context[name])

    share = LAYERS // STAGES
    for i in range(stage * share, (stage + 1) * share):
        build(f"model.layers.{i}.attn", FULL)
    if method is not None and stage == STAGES - 1:
        building[0] = SimpleNamespace(attention_config=object())
        own = replace(FULL, num_kv_heads=max(kv_heads // RANKS, 1))
        for i in range(layers):
            build(f"draft.{i}.attn", own)
    specs = {}
    for name, entry in context.items():
        if getattr(entry, "kv_sharing_target_layer_name", None):
            continue
        spec = entry.get_kv_cache_spec(config)
        spec = entry.get_attn_backend().customize_spec(spec)
        if hasattr(spec, "is_draft"):  # 0.33's worker tells of a drafter's entries
            spec = replace(spec, is_draft=name.startswith("draft."))
        specs[name] = spec
    return specs, config, context


def plan(monkeypatch, *args, **kwargs):
    """The configurations of the four workers, their contexts."""
    compat.register_kv_cache_spec()
    monkeypatch.setattr(backend, "measure_loaded_model", lambda _: None)
    made = [
        specs_of(monkeypatch, stage, rank, *args, **kwargs)
        for stage in range(STAGES)
        for rank in range(RANKS)
    ]
    specs = [specs for specs, _, _ in made]
    config = made[0][1]
    memory = [1 << 28] * len(specs)
    if planning is kv_cache_utils:
        configs = planning.get_kv_cache_configs(config, specs, memory)
    else:
        groups = planning.get_global_kv_cache_groups(config, specs)
        configs = planning.get_kv_cache_configs(config, specs, memory, groups)
    assert len({config.num_blocks for config in configs}) == 1
    return configs, [context for _, _, context in made]


def spec_of(group):
    spec = group.kv_cache_spec
    is_mixed = isinstance(spec, UniformTypeKVCacheSpecs)
    return next(iter(spec.kv_cache_specs.values())) if is_mixed else spec


def kinds_of(config) -> list[type]:
    return [type(spec_of(group)) for group in config.kv_cache_groups]


def drafted(group) -> list[str]:
    return [name for name in group.layer_names if name.startswith("draft.")]


def check_groups(configs, contexts) -> None:
    """Groups are of one size on every worker; each entry is in its kind's."""
    (size,) = {
        len(group.layer_names) for config in configs for group in config.kv_cache_groups
    }
    assert kinds_of(configs[0]) == kinds_of(configs[1]) == kinds_of(configs[-1])
    for config, context in zip(configs, contexts, strict=True):
        names = [n for group in config.kv_cache_groups for n in group.layer_names]
        assert len(names) == len(set(names)) == size * len(config.kv_cache_groups)
        for group in config.kv_cache_groups:
            kinds = {
                context[name].attn_backend.is_retrieval for name in group.layer_names
            }
            assert kinds == {type(spec_of(group)) is RetrievalSpec}
        with_drafter = [group for group in config.kv_cache_groups if drafted(group)]
        assert len(with_drafter) <= 1, "a drafter has one block table"


def test_one_policy_for_all(monkeypatch):
    configs, _ = plan(monkeypatch, None)
    for config in configs:
        assert kinds_of(config) == [SinkSpec]
        assert len(config.kv_cache_groups[0].layer_names) == LAYERS // STAGES
    configs, _ = plan(monkeypatch, None, "eagle")
    counts = [len(config.kv_cache_groups[0].layer_names) for config in configs]
    assert counts == [3, 3, 4, 4]


def test_uneven_stages(monkeypatch):
    """5, 1, 0 and 2 retrieval heads of 6 on a worker: 5 places for them, 10 others."""
    configs, contexts = plan(monkeypatch, UNEVEN)
    check_groups(configs, contexts)
    assert Counter(kinds_of(configs[0])) == {RetrievalSpec: 1, SinkSpec: 2}
    assert len(configs[0].kv_cache_groups[0].layer_names) == 5


def test_whole_layers(monkeypatch):
    """Two of three layers, then one of three."""
    configs, contexts = plan(monkeypatch, WHOLE)
    check_groups(configs, contexts)
    assert Counter(kinds_of(configs[0])) == {RetrievalSpec: 1, SinkSpec: 1}
    assert len(configs[0].kv_cache_groups[0].layer_names) == 2


@pytest.mark.parametrize("method, kind", [("eagle3", SinkSpec), ("mtp", RetrievalSpec)])
@pytest.mark.parametrize(
    "share, layers, kv_heads",
    [(0.1, 2, 1), (0.1, 1, 2), (0.3, 1, 4), (0.3, 1, 6), (0.7, 2, 2), (0.7, 3, 4)],
)
def test_a_drafter_is_in_one_group(monkeypatch, method, kind, share, layers, kv_heads):
    """Whatever the map, and however many heads the drafter has."""
    rng = random.Random(layers)
    heads = [[rng.random() < share for _ in range(KV_HEADS)] for _ in range(LAYERS)]
    heads[0][:2] = True, False
    configs, contexts = plan(monkeypatch, heads, method, layers, kv_heads)
    check_groups(configs, contexts)
    for config in configs[-RANKS:]:
        (group,) = (group for group in config.kv_cache_groups if drafted(group))
        assert len(drafted(group)) == layers * max(kv_heads // RANKS, 1)
        assert type(spec_of(group)) is kind
        if method == "mtp":  # vLLM finds its group by the last entry of all
            assert [g.is_eagle_group for g in config.kv_cache_groups] == [
                g is group for g in config.kv_cache_groups
            ]


@pytest.mark.parametrize("layers", [1, 2])
def test_a_drafter_beside_whole_layers(monkeypatch, layers):
    configs, contexts = plan(monkeypatch, WHOLE, "mtp", layers)
    check_groups(configs, contexts)
    (group,) = (group for group in configs[-1].kv_cache_groups if drafted(group))
    assert type(spec_of(group)) is RetrievalSpec and len(drafted(group)) == layers


def test_a_drafter_of_other_heads_is_refused(monkeypatch):
    message = (
        "speculative_config.model must have KV heads like those of the served model "
        r".* got draft.0.attn with FullAttentionSpec.*; draft with n-grams or drop"
    )
    with pytest.raises(ValueError, match=message):
        plan(monkeypatch, WHOLE, "mtp", 1, 2)
