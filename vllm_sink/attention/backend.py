"""The ``SINK`` attention backend, as a class that vLLM can ask.

vLLM asks classes, not instances, and tells them neither engine nor layer. So each
layer gets a class of its engine and of its kind of heads (:func:`place_layer`).

The CPU path is in ``cpu``, the GPU path in ``gpu_plan`` and ``gpu``; ``base`` is
what both share.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionType,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheLayout,
    SlidingWindowSpec,
)

from vllm_sink.attention import gpu_support
from vllm_sink.attention.base import SinkBuilderBase, SinkImplBase
from vllm_sink.attention.gpu_memory import preferred_block_size
from vllm_sink.cache.draft_heads import add_drafters
from vllm_sink.cache.draft_slots import add_drafter_slots
from vllm_sink.cache.head_caches import add_companions
from vllm_sink.cache.layers_beside import Spec
from vllm_sink.cache.slot_groups import SlotGroups, add_slots
from vllm_sink.cache.spec import OwnWindowSpec, RetrievalSpec, SinkSpec, SlotSpec
from vllm_sink.cache.workers import is_building_drafter
from vllm_sink.engine import Engine
from vllm_sink.policy.slots import has_layers_beside
from vllm_sink.rotation.measure import measure_loaded_model


class SinkBackend(AttentionBackend):
    """Attention sinks plus a window, exact to the token.

    Attributes:
        engine: The engine whose layers have this class; None before they are built.
        is_retrieval: The layers' heads are retrieval heads.
    """

    engine: ClassVar[Engine | None] = None
    is_retrieval: ClassVar[bool] = False
    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]
    supported_kv_cache_dtypes: ClassVar[list] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "SINK"

    @classmethod
    def get_impl_cls(cls) -> type[SinkImplBase]:
        if cls._serves_in_triton():
            from vllm_sink.attention.gpu import SinkGpuImpl  # imports Triton

            return SinkGpuImpl
        from vllm_sink.attention.cpu import SinkCpuImpl

        return SinkCpuImpl

    @classmethod
    def get_builder_cls(cls) -> type[SinkBuilderBase]:
        if cls._serves_in_triton():
            from vllm_sink.attention.gpu_plan import SinkGpuMetadataBuilder

            return SinkGpuMetadataBuilder
        from vllm_sink.attention.cpu import SinkCpuMetadataBuilder

        return SinkCpuMetadataBuilder

    @classmethod
    def _serves_in_triton(cls) -> bool:
        """Whether Triton kernels serve: on GPUs, and where they are interpreted."""
        if not current_platform.is_cpu():
            return True
        engine, vllm_config = cls.engine, get_current_vllm_config_or_none()
        if engine is None and vllm_config is not None:  # a layer is being built
            engine = Engine.of(vllm_config)
        return engine is not None and engine.config.triton_interpreter

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Larger blocks for very long streams on GPUs; ``--block-size`` overrides."""
        vllm_config = get_current_vllm_config_or_none()
        if current_platform.is_cpu() or vllm_config is None:
            return super().get_preferred_block_size(default_block_size)
        return preferred_block_size(
            default_block_size, vllm_config.model_config.max_model_len
        )

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...] | None:
        if cls._serves_in_triton():
            return None  # any: the kernels take strides
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return current_platform.is_cpu() or gpu_support.supports_head_size(head_size)

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype) -> bool:
        if kv_cache_dtype in gpu_support.FP8_KV_CACHE_DTYPES:
            return not current_platform.is_cpu()
        return super().supports_kv_cache_dtype(kv_cache_dtype)

    @classmethod
    def supports_sink(cls) -> bool:
        return True  # vLLM's name for sink *logits*

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return True  # which one is asked at start

    @classmethod
    def supports_compute_capability(cls, capability) -> bool:
        return gpu_support.supports_capability(capability)

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability,
    ) -> str | None:
        return gpu_support.refusal(head_size, dtype, kv_cache_dtype, device_capability)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The spec of a layer: full attention comes under the policy, own windows stay.

        vLLM asks once the model is loaded, before it profiles, compiles and captures,
        so this is where the rotation is measured.
        """
        assert cls.engine is not None, "a layer was built without being registered"
        measure_loaded_model(cls.engine)
        if type(spec) is SlidingWindowSpec:
            assert not cls.is_retrieval, spec
            return cls._paged(OwnWindowSpec.from_window(spec))
        is_full = type(spec) in (FullAttentionSpec, SlotSpec)
        if not is_full or spec.sliding_window is not None:
            assert not cls.is_retrieval, spec
            return spec
        # A slot has its page. Of one token vLLM asks before it settles the block size.
        if type(spec) is FullAttentionSpec and spec.block_size > 1:
            spec = cls._paged(spec)
        config, window = cls.engine.config, None
        if cls.is_retrieval:
            window = config.retrieval_window_size
            if window is None:
                return RetrievalSpec.from_full(spec)
        return SinkSpec.from_full(spec, config, window)

    @classmethod
    def _paged(cls, spec: Spec) -> Spec:
        """In a page like all others, where heads of two kinds share their pool."""
        assert cls.engine is not None
        groups = cls.engine.head_groups
        if not isinstance(groups, SlotGroups):
            return spec
        return groups.paged_spec(spec, cls.engine.vllm_config)

    @classmethod
    def refuse_unsupported(cls, selector: Any) -> None:
        """Refuse what this backend does not do, on the CPU.

        CUDA and ROCm call :meth:`validate_configuration` instead.

        Raises:
            ValueError: Names what this backend does not do.
        """
        refused = {
            "MLA": selector.use_mla,
            "sparse attention": selector.use_sparse,
            f"attention of type {selector.attn_type}": not cls.supports_attn_type(
                selector.attn_type
            ),
            f"block_size {selector.block_size}": not cls.supports_block_size(
                selector.block_size
            ),
            "bidirectional (non-causal) attention": selector.use_non_causal,
            "multimodal prefix attention": selector.use_mm_prefix,
        }
        for name, is_asked in refused.items():
            if is_asked:
                raise ValueError(
                    f"--attention-backend sink must be left out for {name}, which it "
                    "does not support; drop the flag or choose another model or "
                    "setting"
                )
        if not cls.supports_kv_cache_dtype(selector.kv_cache_dtype):
            who = ", which the checkpoint asks for" if _orders_cache_dtype() else ""
            raise ValueError(
                "--kv-cache-dtype must be auto, float16 or bfloat16 with "
                f"--attention-backend sink on a CPU, got {selector.kv_cache_dtype}"
                f"{who}; pass --kv-cache-dtype bfloat16"
            )


def _orders_cache_dtype() -> bool:
    """Whether the checkpoint, not the user, may have chosen the cache's dtype."""
    vllm_config = get_current_vllm_config_or_none()
    model = vllm_config and vllm_config.model_config
    quantization = getattr(model and model.hf_config, "quantization_config", None) or {}
    # ModelOpt's own file has them one level deeper.
    levels = (quantization, quantization.get("quantization") or {})
    names = ("kv_cache_scheme", "kv_cache_quant_algo")
    return any(level.get(name) for level in levels for name in names)


def place_layer(engine: Engine, layer: Any) -> None:
    """Bind a layer that was just built to its engine, and give it its heads.

    Args:
        layer: A module with an attention backend, maybe another one than ours.
    """
    backend = layer.attn_backend
    is_ours = isinstance(backend, type) and issubclass(backend, SinkBackend)
    if not is_ours or backend.engine is not None:
        return
    heads = engine.config.head_map
    is_plain = backend is SinkBackend and isinstance(layer, Attention)
    if heads is None or not heads.num_retrieval_heads or not is_plain:
        layer.attn_backend = bound(backend, engine, is_retrieval=False)
        return
    model = engine.vllm_config.model_config
    beside = has_layers_beside(model.is_hybrid, heads)
    if is_building_drafter(engine.vllm_config):
        add = add_drafter_slots if beside else add_drafters
    else:
        add = add_slots if beside else add_companions
    add(
        engine,
        layer,
        heads,
        bound(backend, engine, is_retrieval=False),
        bound(backend, engine, is_retrieval=True),
    )


def bound(
    backend: type[SinkBackend], engine: Engine, *, is_retrieval: bool
) -> type[SinkBackend]:
    """The subclass of ``backend`` for an engine's layers with heads of one kind.

    Made once.

    Args:
        backend: :class:`SinkBackend`, or what vLLM derives from it for a layer.
    """
    known = engine.backends.get((backend, is_retrieval))
    if known is None:
        # vLLM tells groups of layers apart by the class's qualified name, too.
        name = f"{backend.__qualname__}{'OfRetrievalHeads' if is_retrieval else ''}"
        known = type(name, (backend,), {"engine": engine, "is_retrieval": is_retrieval})
        engine.backends[backend, is_retrieval] = known
    return known
