"""Workers of served models as vLLM's planning of the KV cache meets them.

No weights: the shapes of a model's layers, entered where vLLM's loader leaves them,
under a head map that is uneven between tensor-parallel ranks.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from transformers import CONFIG_MAPPING
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheLayout,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from tests.helpers.refusals import stub_engine
from vllm_sink.attention import backend
from vllm_sink.cache import slot_groups
from vllm_sink.engine import Engine
from vllm_sink.plugin import compat
from vllm_sink.policy.layout import cdiv
from vllm_sink.policy.slots import SlotMemory
from vllm_sink.settings.layer_kinds import layer_owners

try:  # vLLM 0.33
    from vllm.v1.core import kv_cache_planning as planning
except ImportError:
    planning = kv_cache_utils

LENGTH, IN_FLIGHT, BLOCK = 40_000, 4096, 16
SINKS, WINDOW = 4, 2044
MEMORY = 1 << 36


@dataclass(frozen=True)
class Model:
    """A served model's layers with KV caches.

    Args:
        name: Of the test.
        kind: Hugging Face's model_type.
        config: Changes to its configuration.
        kv_heads, head_size: Of a governed layer.
        own_window: (tokens, KV heads, head size) of layers with windows of their own.
        states: vLLM's function for the shapes of a layer's states, and its arguments.
        dtypes: Of a layer's states.
        num_checkpoints: States that a step of a prefill writes besides, at most.
        is_counted: ``vllm-sink size`` knows it.
    """

    name: str
    kind: str
    config: dict[str, Any]
    kv_heads: int
    head_size: int
    own_window: tuple[int, int, int] | None = None
    states: tuple[str, dict[str, int]] | None = None
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.bfloat16, torch.float32)
    num_checkpoints: int = 0
    is_counted: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def hf_config(self) -> Any:
        return CONFIG_MAPPING[self.kind](**self.config, dtype="bfloat16")

    @property
    def owners(self) -> tuple[int | None, ...]:
        """As of :func:`layer_owners`, for each layer."""
        text = self.hf_config.get_text_config()
        count = text.num_hidden_layers
        return layer_owners(text, count) or tuple(range(count))


FOURTH = {"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 12}
DELTA = "gated_delta_net_state_shape"
DELTA_SIZES = dict(num_k_heads=16, head_k_dim=128, head_v_dim=128, conv_kernel_size=4)
MAMBA = "mamba2_state_shape"
STATEFUL = ("linear_attention", "mamba", "hybrid")
NEMOTRON = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
MODELS = [
    Model(
        "Gemma 3 27B",
        "gemma3_text",
        dict(
            num_hidden_layers=62,
            num_attention_heads=32,
            num_key_value_heads=16,
            head_dim=128,
            sliding_window=1024,
        ),
        16,
        128,
        own_window=(1024, 16, 128),
    ),
    Model(
        "gpt-oss 20b",
        "gpt_oss",
        dict(num_hidden_layers=24),
        8,
        64,
        own_window=(128, 8, 64),
    ),
    Model(
        "windows of more heads",
        "gpt_oss",
        dict(num_hidden_layers=24),
        8,
        64,
        own_window=(128, 12, 96),
        is_counted=False,  # no configuration that it knows says so
    ),
    Model(
        "Gemma 4, shared keys",
        "gemma4_text",
        dict(num_kv_shared_layers=12),
        4,
        512,
        own_window=(512, 4, 256),
    ),
    Model(
        "Qwen3-Next 80B",
        "qwen3_next",
        dict(num_hidden_layers=48, num_key_value_heads=2, head_dim=256, **FOURTH),
        2,
        256,
        states=(DELTA, dict(num_v_heads=32, **DELTA_SIZES)),
        dtypes=(torch.bfloat16, torch.bfloat16),
    ),
    Model(
        "Qwen3.5 27B",
        "qwen3_5_text",
        dict(
            num_hidden_layers=48,
            linear_num_value_heads=48,
            mamba_ssm_dtype="float32",
            **FOURTH,
        ),
        4,
        256,
        states=(DELTA, dict(num_v_heads=48, **DELTA_SIZES)),
    ),
    Model(
        "Falcon-H1 34B",
        "falcon_h1",
        dict(
            num_hidden_layers=72,
            hidden_size=5120,
            num_attention_heads=20,
            num_key_value_heads=4,
            head_dim=128,
            mamba_d_ssm=4096,
            mamba_n_heads=32,
            mamba_d_head=128,
            mamba_n_groups=2,
        ),
        4,
        128,
        states=(
            MAMBA,
            dict(
                intermediate_size=4096,
                n_groups=2,
                num_heads=32,
                head_dim=128,
                state_size=256,
                conv_kernel=4,
            ),
        ),
        dtypes=(torch.bfloat16, torch.bfloat16),
        num_checkpoints=1,
    ),
    Model(
        "Nemotron-H 8B",
        "nemotron_h",
        dict(
            layers_block_type=[
                {"M": "mamba", "-": "mlp", "*": "attention"}[mark] for mark in NEMOTRON
            ],
            num_hidden_layers=len(NEMOTRON),
        ),
        8,
        128,
        states=(
            MAMBA,
            dict(
                intermediate_size=8192,
                n_groups=8,
                num_heads=128,
                head_dim=64,
                state_size=128,
                conv_kernel=4,
            ),
        ),
        num_checkpoints=1,
    ),
]


class Layer(Attention):
    """What the plugin and vLLM's planning read of an attention layer."""

    def __init__(self, name: str, spec: Any, target: str | None = None) -> None:
        torch.nn.Module.__init__(self)
        self.layer_name, self.spec = name, spec
        self.attn_backend = backend.SinkBackend
        self.sliding_window = getattr(spec, "sliding_window", None)
        self.kv_sharing_target_layer_name = target
        self.num_heads, self.num_kv_heads = 8, spec.num_kv_heads
        self.impl = SimpleNamespace(heads=None)

    def get_kv_cache_spec(self, vllm_config):
        return self.spec


class State(MambaBase):
    """What is read of a layer with states."""

    mamba_type = MambaAttentionBackendEnum.MAMBA2

    def __init__(self, spec: MambaSpec) -> None:
        self.spec = spec

    def get_kv_cache_spec(self, vllm_config):
        return self.spec

    def get_state_shape(self):
        return self.spec.shapes

    def get_state_dtype(self):
        return self.spec.dtypes


def uneven(model: Model) -> list[list[int]]:
    """Scores: most retrieval heads are the first half's; some layer has both kinds."""
    rng = random.Random(1)
    half = model.kv_heads // 2
    rows = [
        [int(rng.random() < (0.5 if head < half else 0.1)) for head in range(2 * half)]
        for _ in model.owners
    ]
    first = next(i for i, owner in enumerate(model.owners) if owner == i)
    rows[first] = [1, *[0] * (2 * half - 1)]
    return rows


def whole_layers(model: Model) -> list[list[int]]:
    """Scores: the first governed layer's heads are retrieval heads, no other's."""
    first = model.owners.index(next(x for x in model.owners if x is not None))
    return [[int(i == first)] * model.kv_heads for i in range(len(model.owners))]


def worker_engine(
    model: Model,
    ranks: int,
    layout: KVCacheLayout,
    caches: bool,
    heads: list[list[int]],
) -> Engine:
    """The record of a worker's engine.

    Args:
        ranks: Tensor-parallel workers.
        caches: With prefix caching.
    """
    hf_config = model.hf_config
    text = hf_config.get_text_config()
    changes = {
        "hf_config": hf_config,
        "hf_text_config": text,
        "is_hybrid": model.states is not None,
        "get_total_num_hidden_layers": lambda: text.num_hidden_layers,
        "get_total_num_kv_heads": lambda: model.kv_heads,
        "original_max_model_len": LENGTH,
        "max_model_len": LENGTH,
        "supports_kv_cache_grouping": False,
    }
    section = {
        "num_sink_tokens": SINKS,
        "window_size": WINDOW,
        "retrieval_heads": heads,
    }
    engine = stub_engine(
        additional_config={"sink": section},
        **{f"model_config__{name}": value for name, value in changes.items()},
    )
    config = engine.vllm_config
    config.parallel_config.tensor_parallel_size = ranks
    vars(config.cache_config).update(
        num_gpu_blocks_override=None,
        prefix_cache_retention_interval=None,
        prefix_match_unit=None,
        enable_prefix_caching=caches,
        mamba_cache_mode="align" if caches else "none",
        get_resolved_kv_cache_layout=lambda: layout,
    )
    config.attention_config.hisparse_config = None
    config.num_prefill_lookahead_tokens = 0
    config.max_in_flight_tokens = IN_FLIGHT
    return engine


def state_shapes(model: Model, ranks: int) -> tuple[tuple[int, ...], ...]:
    """Of a convolution's state and a recurrent one, by vLLM's arithmetic."""
    assert model.states is not None
    name, sizes = model.states
    return getattr(MambaStateShapeCalculator, name)(tp_world_size=ranks, **sizes)


def build(model: Model, engine: Engine, ranks: int) -> None:
    """A worker's layers, entered in the order of the model."""
    config = engine.vllm_config
    context = config.compilation_config.static_forward_context
    text = model.hf_config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["hybrid"] * len(model.owners)
    shared = getattr(text, "num_kv_shared_layers", None) or 0
    num_owners = len(kinds) - shared

    def attention(kv_heads: int, size: int, block_size: int) -> dict[str, Any]:
        return {
            "block_size": block_size,
            "num_kv_heads": max(kv_heads // ranks, 1),
            "head_size": size,
            "dtype": torch.bfloat16,
        }

    block_size, state = BLOCK, None
    if model.states is not None:  # as vLLM's platforms settle it
        shapes = state_shapes(model, ranks)
        state = MambaSpec(block_size=LENGTH, shapes=shapes, dtypes=model.dtypes)
        one = attention(model.kv_heads, model.head_size, 1)
        token = FullAttentionSpec(**one).page_size_bytes
        block_size = BLOCK * cdiv(state.page_size_bytes, BLOCK * token)
        mode = config.cache_config.mamba_cache_mode
        state = replace(
            state,
            block_size=block_size if mode == "align" else LENGTH,
            page_size_padded=block_size * token,
            mamba_cache_mode=mode,
            num_prefill_checkpoint_blocks=model.num_checkpoints,
            prefill_checkpoint_alignment=1 if model.num_checkpoints else None,
        )
    for i, (owner, kind) in enumerate(zip(model.owners, kinds, strict=True)):
        name = f"model.layers.{i}.attn"
        last = max((j for j in range(num_owners) if kinds[j] == kind), default=i)
        target = None if i < num_owners else f"model.layers.{last}.attn"
        spec: KVCacheSpec | None = None
        if owner is not None:
            full = attention(model.kv_heads, model.head_size, block_size)
            spec = FullAttentionSpec(**full)
        elif model.own_window is not None:
            tokens, *sizes = model.own_window
            own = attention(*sizes, block_size)
            spec = SlidingWindowSpec(**own, sliding_window=tokens)
        if spec is not None:
            context[name] = Layer(name, spec, target)
            backend.place_layer(engine, context[name])
        if state is not None and kind in STATEFUL:
            context[f"model.layers.{i}.mixer"] = State(state)


def specs_of(config: Any) -> dict[str, KVCacheSpec]:
    """What a worker gives vLLM."""
    specs = {}
    for name, entry in config.compilation_config.static_forward_context.items():
        if getattr(entry, "kv_sharing_target_layer_name", None):
            continue
        spec = entry.get_kv_cache_spec(config)
        if isinstance(spec, AttentionSpec):
            spec = entry.get_attn_backend().customize_spec(spec)
        if spec is not None:
            specs[name] = spec
    return specs


@dataclass(frozen=True)
class Plan:
    """What the plugin and vLLM make of an engine's workers.

    Args:
        engine: The first worker's.
        memories: What each worker's start line tells from.
        configs: vLLM's, of each worker.
    """

    engine: Engine
    memories: list[SlotMemory]
    configs: list[KVCacheConfig]


def plan(
    monkeypatch: Any,
    model: Model,
    ranks: int,
    layout: KVCacheLayout,
    caches: bool,
    heads_of: Callable[[Model], list[list[int]]] = uneven,
) -> Plan:
    """vLLM's whole planning of the specs that each worker gives it."""
    compat.register_kv_cache_spec()
    monkeypatch.setattr(backend, "measure_loaded_model", lambda _: None)
    engines, specs, memories = [], [], []
    for rank in range(ranks):
        engine = worker_engine(model, ranks, layout, caches, heads_of(model))
        config = engine.vllm_config
        monkeypatch.setattr(
            slot_groups, "get_tensor_model_parallel_rank", lambda rank=rank: rank
        )
        monkeypatch.setattr(
            slot_groups, "get_current_vllm_config", lambda config=config: config
        )
        build(model, engine, ranks)
        engines.append(engine)
        specs.append(specs_of(config))
        memories.append(engine.head_groups.plan(config))
    config, memory = engines[0].vllm_config, [MEMORY] * ranks
    if planning is kv_cache_utils:
        configs = planning.get_kv_cache_configs(config, specs, memory)
    else:
        groups = planning.get_global_kv_cache_groups(config, specs)
        configs = planning.get_kv_cache_configs(config, specs, memory, groups)
    return Plan(engines[0], memories, configs)
