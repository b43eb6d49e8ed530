"""vLLM's planning for 2 pipeline stages x 2 tensor-parallel ranks, on 0.32 and 0.33."""

import random
from collections import Counter

import pytest

from tests.helpers.workers import (
    FULL,
    RANKS,
    STAGES,
    Model,
    full_spec,
    kinds_of,
    spec_of,
)
from tests.helpers.workers import plan as plan_model
from vllm_sink.cache.spec import RetrievalSpec, SinkSpec

LAYERS, KV_HEADS = 6, 4
MODEL = Model((FULL,) * LAYERS, {FULL: full_spec(KV_HEADS // RANKS)}, KV_HEADS)
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


def plan(monkeypatch, *args, **kwargs):
    """The configurations of the four workers, their contexts."""
    return plan_model(monkeypatch, MODEL, *args, **kwargs)[:2]


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
