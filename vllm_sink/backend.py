"""The ``SINK`` attention backend: what vLLM asks of a backend class; the CPU path.

The GPU path is in ``gpu_metadata`` and ``gpu_impl``; ``base`` is what both share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadata,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout
from vllm_sink_kernels import cpu, cpu_write

from vllm_sink import gpu_support
from vllm_sink.base import SinkBuilderBase, SinkImplBase, engine_config
from vllm_sink.kv_cache_spec import SinkSpec


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
            from vllm_sink.gpu_impl import SinkGpuImpl  # imports Triton

            return SinkGpuImpl
        return SinkImpl

    @staticmethod
    def get_builder_cls() -> type[SinkBuilderBase]:
        if serves_in_triton():
            from vllm_sink.gpu_metadata import SinkGpuMetadataBuilder

            return SinkGpuMetadataBuilder
        return SinkMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

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
        """Full attention becomes the sink policy; other windows stay as they are."""
        if type(spec) is FullAttentionSpec and spec.sliding_window is None:
            return SinkSpec.from_full(spec, engine_config())
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
            f"kv_cache_dtype {selector.kv_cache_dtype}": (
                not cls.supports_kv_cache_dtype(selector.kv_cache_dtype)
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


@dataclass
class SinkMetadata(AttentionMetadata):
    """One step's plan, shared by all layers of a KV cache group.

    Args:
        num_tokens: T, query tokens without padding.
        plan: The CPU path's plan.
        slots: [T] int64, where each token's K and V go.
        turns: id of a rotary table -> (cos, sin, is_neox) of the sink turn.
    """

    num_tokens: int
    plan: cpu.Plan
    slots: torch.Tensor
    turns: dict[int, tuple[torch.Tensor, torch.Tensor, bool]]


class SinkMetadataBuilder(SinkBuilderBase[SinkMetadata]):
    """Plans a step once for all layers of a group."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        cpu.compile_for(kv_cache_spec.dtype)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SinkMetadata:
        common = common_attn_metadata
        num_tokens = common.num_actual_tokens
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        seq_lens = common.seq_lens[: common.num_reqs].tolist()
        plan = cpu.plan(
            common.block_table_tensor,
            starts,
            seq_lens,
            num_sink_tokens=self.policy.num_sink_tokens,
            window_size=self.policy.window_size,
            block_size=self.block_size,
        )
        turns = {}
        if self.rotations and max(seq_lens, default=0) > self.policy.budget:
            # Of a request that ends in row e at length n, row r is at n - e + r.
            ends = torch.tensor(starts[1:])
            offsets = torch.tensor(seq_lens) - ends
            positions = torch.arange(num_tokens) + offsets.repeat_interleave(
                ends - torch.tensor(starts[:-1])
            )
            turns = {
                key: (*rotation.turn(positions, self.policy.budget), rotation.is_neox)
                for key, rotation in self.rotations.items()
            }
        return SinkMetadata(
            num_tokens=num_tokens,
            plan=plan,
            slots=common.slot_mapping[:num_tokens],
            turns=turns,
        )


class SinkImpl(SinkImplBase[SinkMetadata]):
    """One layer's attention on the CPU."""

    def forward(
        self,
        layer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SinkMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write this step's K and V, then attend.

        Args:
            query, output: [T, HQ, D]. key, value: [T, HKV, D].
            kv_cache: [B, HKV, N, 2D]; its bytes are used as [B, HKV, 2N, D].
            attn_metadata: None while vLLM warms up.
        """
        if attn_metadata is None:
            return output
        n = attn_metadata.num_tokens
        blocks, heads, size, width = kv_cache.shape
        pages = kv_cache.view(blocks, heads, 2 * size, width // 2)
        if self.writes_cache and key is not None:
            cpu_write.write_kv(key, value, pages, attn_metadata.slots)
        turn = None
        if self.rotation is not None and attn_metadata.turns:
            turn = attn_metadata.turns[id(self.rotation.cos_sin_cache)]
        cpu.attend(
            query[:n],
            pages,
            attn_metadata.plan,
            output[:n],
            scale=self.scale,
            turn=turn,
            soft_cap=self.soft_cap,
            sink_logits=self.sink_logits,
        )
        return output
