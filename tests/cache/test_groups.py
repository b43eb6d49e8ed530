"""vLLM's own grouping of our layers beside the model's windows, on 0.32 and 0.33."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheLayout,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from tests.helpers.refusals import stub_engine
from vllm_sink.attention import backend
from vllm_sink.cache.block_manager import SinkManager
from vllm_sink.plugin import compat

try:  # vLLM 0.33
    from vllm.v1.core import kv_cache_planning as planning
except ImportError:
    planning = kv_cache_utils

WINDOW = 60
SHAPE = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
FULL = FullAttentionSpec(**SHAPE)
OWN = SlidingWindowSpec(**SHAPE, sliding_window=WINDOW)  # W is the model's window, too


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    compat.register_kv_cache_spec()
    monkeypatch.setattr(backend, "measure_loaded_model", lambda _: None)


def groups_of(layers: dict, *, layout=KVCacheLayout.LBHNC, is_hybrid=True) -> list:
    """[(layer names, manager class)], as an engine core gets them."""
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=not is_hybrid),
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: layout),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
    )
    section = {"num_sink_tokens": 4, "window_size": WINDOW}
    engine = stub_engine(additional_config={"sink": section})
    ours = backend.bound(backend.SinkBackend, engine, is_retrieval=False)
    specs = {name: ours.customize_spec(spec) for name, spec in layers.items()}
    found = []
    for group in planning.get_kv_cache_groups(config, specs):
        spec = group.kv_cache_spec
        if isinstance(spec, UniformTypeKVCacheSpecs):
            spec = spec.first_spec  # whose manager all of the group's layers get
        manager = KVCacheSpecRegistry.get_manager_class(spec)
        found.append((sorted(group.layer_names), manager))
    return found


def check(layers: dict, **settings) -> None:
    groups = groups_of(layers, **settings)
    ours = {name for name, spec in layers.items() if type(spec) is FullAttentionSpec}
    for names, manager in groups:
        assert issubclass(manager, SinkManager) == bool(ours & set(names)), groups
        assert not ours & set(names) or set(names) <= ours, groups
    assert sorted(name for names, _ in groups for name in names) == sorted(layers)


ORDERS = {
    "window first": ("own", "full", "own", "full"),
    "full first": ("full", "own", "full", "own"),
    "a drafter's window": ("full", "full", "full", "own"),
    "a drafter without": ("own", "own", "own", "full"),
}


def layers_of(order: str, **kinds) -> dict:
    kinds = {"own": OWN, "full": FULL} | kinds
    return {f"layers.{i}": kinds[kind] for i, kind in enumerate(ORDERS[order])}


@pytest.mark.parametrize("order", ORDERS)
def test_equal_pages(order):
    check(layers_of(order))


@pytest.mark.parametrize("layout", [KVCacheLayout.LBHNC, KVCacheLayout.BLHNC])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("wide", ["own", "full"])
def test_unequal_pages(order, layout, wide):
    """Packed side by side, by buckets of like layers; or blocks of other sizes."""
    wider = replace(OWN if wide == "own" else FULL, num_kv_heads=4)
    check(layers_of(order, **{wide: wider}), layout=layout)


def test_pages_that_are_unequal_among_the_windows():
    layers = layers_of("window first") | {"layers.4": replace(OWN, num_kv_heads=4)}
    check(layers, layout=KVCacheLayout.BLHNC)


@pytest.mark.parametrize("order", ORDERS)
def test_nothing_is_promoted_to_one_kind(order):
    """--disable-hybrid-kv-cache-manager: refused at start, and never swallowed."""
    with pytest.raises(ValueError, match="Failed to promote"):
        groups_of(layers_of(order), is_hybrid=False)


def test_windows_alone_stay_one_group():
    (names, manager), *rest = groups_of({"layers.0": OWN, "layers.1": OWN})
    assert not rest and len(names) == 2 and not issubclass(manager, SinkManager)
