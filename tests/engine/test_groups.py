"""Groups that the policy does not govern, in the engine core."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.engine.core import EngineCore
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, SlidingWindowSpec

import vllm_sink
from tests.helpers.block_managers import full_spec, make_manager, sink_spec
from tests.helpers.refusals import Config, stub_config
from vllm_sink.attention.backend import SinkBackend, place_layer
from vllm_sink.cache.spec import OwnWindowSpec, RetrievalSpec
from vllm_sink.engine import Engine
from vllm_sink.plugin import compat
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.start.groups import check_groups, placed_layers

POLICY = RetentionPolicy(4, 60)
SINK = sink_spec(POLICY, 16)
RETRIEVAL = full_spec(16)
SHAPE = {"block_size": 16, "num_kv_heads": 1, "head_size": 16, "dtype": torch.float32}
OWN = OwnWindowSpec(**SHAPE, sliding_window=60)


def engine_core(*placed, specs=(SINK, RETRIEVAL, OWN), selected=True):
    """One of two equal workers, with a real manager for each of ``specs``."""
    sizes = {"max_model_len": 256, "max_in_flight_tokens": 64}
    kv_cache_manager = make_manager(POLICY, 16, 64, other_specs=specs[1:], **sizes)
    coordinator = kv_cache_manager.coordinator
    if specs[0] is not SINK:
        coordinator.single_type_managers = coordinator.single_type_managers[1:]
    config = stub_config()
    if not selected:
        config.attention_config.backend = None
    return SimpleNamespace(
        vllm_config=config,
        scheduler=SimpleNamespace(kv_cache_manager=kv_cache_manager),
        model_executor=SimpleNamespace(
            collective_rpc=lambda function: [list(placed)] * 2
        ),
    )


def test_what_is_right():
    extra = replace(SINK, extra_retained_tokens=2)  # the engine core's own addition
    check_groups(engine_core(("a", SINK, 0), ("b", RETRIEVAL, 1), ("c", OWN, 2)))
    check_groups(engine_core(("a", extra, 0)))


def test_the_start_orders_the_lookup():
    core = engine_core(("c", OWN, 2))
    groups = core.scheduler.kv_cache_manager.coordinator.attention_groups
    groups.reverse()
    check_groups(core)
    assert [group.spec for group in groups] == [RETRIEVAL, SINK, OWN]


@pytest.mark.parametrize(
    "spec, group, message",
    [
        (SINK, 2, r"x must be managed by SinkManager of 4 \+ 60 .* got SlidingWindowM"),
        (SINK, 1, r"SinkManager of 4 \+ 60 tokens .* got RetrievalManager; choose a"),
        (SINK, None, r"must be managed by SinkManager .* got none; choose"),
        (replace(SINK, num_sink_tokens=8), 0, r"of 8 \+ 60 .* SinkManager of 4 \+ 60"),
        (replace(SINK, sliding_window=61), 0, r"of 4 \+ 61 .* SinkManager of 4 \+ 60"),
        (RETRIEVAL, 0, r"must be managed by RetrievalManager .* got SinkManager of"),
        (RETRIEVAL, 2, r"by RetrievalManager .* got SlidingWindowManager; choose"),
        (OWN, 0, r"must be managed by vLLM's own manager .* got SinkManager of 4"),
        (SlidingWindowSpec(**SHAPE, sliding_window=99), 1, r"got RetrievalManager;"),
    ],
)
def test_what_is_not(spec, group, message):
    with pytest.raises(ValueError, match=message):
        check_groups(engine_core(("a", SINK, 0), ("x", spec, group)))
    check_groups(engine_core(("x", spec, group), selected=False))


def test_a_policy_that_reached_no_group():
    """A platform that ignores the flag gives every layer another backend."""
    message = r"must have a layer .* groups are all vLLM's own \(SlidingWindowManager\)"
    core = engine_core(("x", OWN, 0), specs=(None, OWN))
    with pytest.raises(ValueError, match=message):
        check_groups(core)


def test_a_scheduler_without_block_managers():
    core = engine_core()
    core.scheduler = SimpleNamespace()
    with pytest.raises(ValueError, match=r"scheduler_cls must have .* drop --sched"):
        check_groups(core)


class Layer(AttentionLayerBase):
    def __init__(self, spec, target=None):
        self.spec, self.kv_sharing_target_layer_name = spec, target
        self.attn_backend = SinkBackend

    def get_attn_backend(self):
        return self.attn_backend

    def get_kv_cache_spec(self, vllm_config):
        return self.spec


def test_a_worker_tells_the_groups_of_its_layers():
    """A layer that reads another's cache is where that is, though in no group."""
    layers = {
        "a": Layer(RETRIEVAL),
        "b": Layer(OWN),
        "c": Layer(RETRIEVAL, "a"),
        "d": Layer(None),
        "e": Layer(OWN),
    }
    config = stub_config(compilation_config=Config(static_forward_context=layers))
    for layer in layers.values():
        place_layer(Engine.of(config), layer)
    groups = [KVCacheGroupSpec(["b"], OWN), KVCacheGroupSpec(["a"], RETRIEVAL)]
    runner = SimpleNamespace(
        vllm_config=config, kv_cache_config=SimpleNamespace(kv_cache_groups=groups)
    )
    placed = placed_layers(SimpleNamespace(model_runner=runner))
    assert [(name, group) for name, _, group in placed] == [
        ("a", 1),
        ("b", 0),
        ("c", 1),
        ("e", None),
    ]
    assert isinstance(placed[0][1], RetrievalSpec)


def test_every_engine_core_is_watched(monkeypatch):
    """Plugins are loaded within its ``__init__``: what is wrapped comes later."""
    vllm_sink.register()
    method = getattr(EngineCore, compat._AFTER_SCHEDULER)
    assert method.checked_by_sink
    assert compat.watch_engine_core(print) is None
    assert getattr(EngineCore, compat._AFTER_SCHEDULER) is method, "wrapped once"
    names = EngineCore.__init__.__code__.co_names
    order = ["load_general_plugins", "scheduler", compat._AFTER_SCHEDULER]
    assert [names.index(name) for name in order] == sorted(map(names.index, order))
    monkeypatch.delattr(EngineCore, compat._AFTER_SCHEDULER)
    assert "groups can't be checked" in compat.watch_engine_core(print)
