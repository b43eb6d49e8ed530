"""vLLM's planning for 2 pipeline stages x 2 tensor-parallel ranks: no engine."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheLayout,
    KVCacheSpec,
    UniformTypeKVCacheSpecs,
)

from tests.helpers.refusals import drafter, stub_engine
from vllm_sink.attention import backend
from vllm_sink.cache import draft_heads, draft_slots, head_caches, slot_groups, workers
from vllm_sink.plugin import compat

try:  # vLLM 0.33
    from vllm.v1.core import kv_cache_planning as planning
except ImportError:
    planning = kv_cache_utils

STAGES = RANKS = 2
FULL = "full_attention"


@dataclass(frozen=True)
class Model:
    """A model's layers, as its config.json and vLLM tell of them.

    Args:
        kinds: Of each layer, as in ``layer_types``.
        specs: Of a rank's layer, by kind.
        kv_heads: Of a layer with full attention, on all ranks.
    """

    kinds: tuple[str, ...]
    specs: dict[str, KVCacheSpec]
    kv_heads: int

    @property
    def is_plain(self) -> bool:
        return set(self.kinds) == {FULL}


class Layer(Attention):
    """What the plugin and vLLM's planning read of an attention layer."""

    def __init__(self, name: str, spec: AttentionSpec) -> None:
        torch.nn.Module.__init__(self)
        self.layer_name, self.spec = name, spec
        self.attn_backend = backend.SinkBackend
        self.sliding_window = spec.sliding_window
        self.kv_sharing_target_layer_name = None
        self.num_heads, self.num_kv_heads = 8, spec.num_kv_heads
        self.impl = SimpleNamespace(heads=None)

    def get_kv_cache_spec(self, vllm_config):
        return self.spec


class StateLayer(AttentionLayerBase):
    """A layer with a state: linear attention, Mamba."""

    def __init__(self, spec: KVCacheSpec) -> None:
        self.spec = spec

    def get_attn_backend(self):
        raise AssertionError("a state has no attention backend")

    def get_kv_cache_spec(self, vllm_config):
        return self.spec


def engine_of(model, heads, method, layers, kv_heads, layout):
    speculative = None
    if method is not None:
        draft_model = SimpleNamespace(
            get_total_num_hidden_layers=lambda: layers,
            get_total_num_kv_heads=lambda: kv_heads,
        )
        speculative = drafter(
            method,
            draft_model_config=draft_model,
            use_eagle=lambda: True,
            use_eagle_block_drop=lambda: True,
        )
    section = {"num_sink_tokens": 4, "window_size": 60}
    if heads is not None:
        section["retrieval_heads"] = [list(map(int, layer)) for layer in heads]
    text = SimpleNamespace(num_attention_heads=16)
    if not model.is_plain:
        text.layer_types = list(model.kinds)
    changes = {
        "hf_config": SimpleNamespace(model_type="llama"),
        "hf_text_config": text,
        "is_hybrid": "linear_attention" in model.kinds,
        "get_total_num_hidden_layers": lambda: len(model.kinds),
        "get_total_num_kv_heads": lambda: model.kv_heads,
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
        mamba_cache_mode="none",
        get_resolved_kv_cache_layout=lambda: layout,
    )
    config.attention_config.hisparse_config = None
    config.num_prefill_lookahead_tokens = 0
    config.max_in_flight_tokens = 128
    return engine


def specs_of(monkeypatch, model, stage, rank, heads, method, layers, kv_heads, layout):
    """(specs as a worker gives them to vLLM, its configuration, its context)."""
    engine = engine_of(model, heads, method, layers, kv_heads, layout)
    config = engine.vllm_config
    context = config.compilation_config.static_forward_context
    for module in (head_caches, slot_groups, draft_heads, draft_slots):
        for name, value in (
            ("get_tensor_model_parallel_rank", rank),
            ("get_current_vllm_config", config),
            ("get_pp_group", SimpleNamespace(rank_in_group=stage)),
        ):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda value=value: value)
    building = [config]
    monkeypatch.setattr(workers, "get_current_vllm_config", lambda: building[0])

    def build(name: str, spec: KVCacheSpec) -> None:
        if not isinstance(spec, AttentionSpec):
            context[name] = StateLayer(spec)
            return
        context[name] = Layer(name, spec)
        backend.place_layer(engine, context[name])

    for i in workers.stages_of(config, len(model.kinds))[stage]:
        build(f"model.layers.{i}.attn", model.specs[model.kinds[i]])
    if method is not None and stage == STAGES - 1:
        building[0] = SimpleNamespace(attention_config=object())
        own = replace(model.specs[FULL], num_kv_heads=max(kv_heads // RANKS, 1))
        for i in range(layers):
            build(f"draft.{i}.attn", own)
            context[f"draft.{i}.attn"].is_draft_layer = True
    specs = {}
    for name, entry in list(context.items()):  # as both of vLLM's runners
        if getattr(entry, "kv_sharing_target_layer_name", None):
            continue
        spec = entry.get_kv_cache_spec(config)
        if isinstance(spec, AttentionSpec):
            spec = entry.get_attn_backend().customize_spec(spec)
        if spec is None:
            continue
        if hasattr(spec, "is_draft"):  # 0.33's worker tells of a drafter's entries
            is_draft = entry.is_draft_layer or name.startswith("draft.")
            spec = replace(spec, is_draft=is_draft)
        specs[name] = spec
    return specs, engine, context


def plan(
    monkeypatch,
    model,
    heads,
    method=None,
    layers=1,
    kv_heads=None,
    layout=KVCacheLayout.LBHNC,
):
    """The configurations of the four workers, their contexts and their engines."""
    compat.register_kv_cache_spec()
    monkeypatch.setattr(backend, "measure_loaded_model", lambda _: None)
    settings = heads, method, layers, kv_heads or model.kv_heads, layout
    made = [
        specs_of(monkeypatch, model, stage, rank, *settings)
        for stage in range(STAGES)
        for rank in range(RANKS)
    ]
    specs = [specs for specs, _, _ in made]
    config = made[0][1].vllm_config
    memory = [1 << 28] * len(specs)
    if planning is kv_cache_utils:
        configs = planning.get_kv_cache_configs(config, specs, memory)
    else:
        groups = planning.get_global_kv_cache_groups(config, specs)
        configs = planning.get_kv_cache_configs(config, specs, memory, groups)
    assert len({config.num_blocks for config in configs}) == 1
    return configs, [context for *_, context in made], [engine for _, engine, _ in made]


def spec_of(group):
    spec = group.kv_cache_spec
    is_mixed = isinstance(spec, UniformTypeKVCacheSpecs)
    return next(iter(spec.kv_cache_specs.values())) if is_mixed else spec


def kinds_of(config) -> list[type]:
    return [type(spec_of(group)) for group in config.kv_cache_groups]


def full_spec(kv_heads: int, **changes) -> FullAttentionSpec:
    """Of a rank's layer with so many KV heads."""
    shape = dict(block_size=16, head_size=64, dtype=torch.float32)
    return FullAttentionSpec(num_kv_heads=kv_heads, **shape | changes)
