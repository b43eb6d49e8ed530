"""The ``SINK`` attention backend: what vLLM asks of a backend class.

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
from vllm_sink.attention.base import (
    SinkBuilderBase,
    SinkImplBase,
    engine_config,
    measure_loaded_model,
)
from vllm_sink.attention.gpu_memory import preferred_block_size
from vllm_sink.cache import heads
from vllm_sink.cache.spec import OwnWindowSpec, RetrievalSpec, SinkSpec


def serves_in_triton() -> bool:
    """The GPU path: on GPUs, and on a CPU if the config asks for the interpreter."""
    return not current_platform.is_cpu() or engine_config().triton_interpreter


class SinkBackend(AttentionBackend):
    """Attention sinks plus a window, exact to the token."""

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

    @staticmethod
    def get_impl_cls() -> type[SinkImplBase]:
        if serves_in_triton():
            from vllm_sink.attention.gpu import SinkGpuImpl  # imports Triton

            return SinkGpuImpl
        from vllm_sink.attention.cpu import SinkCpuImpl

        return SinkCpuImpl

    @staticmethod
    def get_builder_cls() -> type[SinkBuilderBase]:
        if serves_in_triton():
            from vllm_sink.attention.gpu_plan import SinkGpuMetadataBuilder

            return SinkGpuMetadataBuilder
        from vllm_sink.attention.cpu import SinkCpuMetadataBuilder

        return SinkCpuMetadataBuilder

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
        if serves_in_triton():
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
        return False

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
        """Full attention becomes the sink policy; other windows stay what they are.

        vLLM asks once the model is loaded, so this is where it is measured.
        """
        measure_loaded_model()
        if type(spec) is FullAttentionSpec and spec.sliding_window is None:
            return SinkSpec.from_full(spec, engine_config())
        if type(spec) is SlidingWindowSpec:
            return OwnWindowSpec.from_window(spec)
        return spec

    @classmethod
    def refuse_unsupported(cls, selector: Any) -> None:
        """What :meth:`validate_configuration` is to CUDA, for the CPU platform.

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


class SinkRetrievalBackend(SinkBackend):
    """The same, for retrieval heads: everything is kept, or a window of their own.

    vLLM asks the class for a spec, so a kind of head is a class.
    """

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        measure_loaded_model()
        config = engine_config()
        assert type(spec) is FullAttentionSpec, spec
        if config.retrieval_window_size is None:
            return RetrievalSpec.from_full(spec)
        return SinkSpec.from_full(spec, config, config.retrieval_window_size)


def give_heads(parent: torch.nn.Module, name: str, child: Any) -> None:
    """A model registers a layer: give it its heads, if it has any of two kinds.

    vLLM's ``Attention`` doesn't say to its backend which layer it is; torch's public
    registration hook sees it once it has a name. Hooked in when vLLM first asks for
    this backend, which is before it makes a layer.
    """
    if getattr(child, "attn_backend", None) is not SinkBackend:
        return
    head_map = engine_config().head_map
    if head_map is None or not head_map.num_retrieval_heads:
        return
    if isinstance(child, Attention) and child.impl.heads is None:
        heads.add_companions(child, head_map, SinkBackend, SinkRetrievalBackend)


torch.nn.modules.module.register_module_module_registration_hook(give_heads)
