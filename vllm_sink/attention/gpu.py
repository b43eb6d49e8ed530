"""The GPU path in one layer: cache write, decode and prefill, all in Triton.

The cache write is the project's own: vLLM's ``reshape_and_cache_flash`` does the
same on a GPU, but does not run where these kernels are interpreted.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms import current_platform
from vllm_sink_kernels.triton.cache_write import write_kv_cache
from vllm_sink_kernels.triton.decode import sink_decode
from vllm_sink_kernels.triton.prefill import sink_prefill

from vllm_sink.attention.base import SinkImplBase
from vllm_sink.attention.gpu_plan import SinkGpuMetadata
from vllm_sink.attention.gpu_support import FP8_KV_CACHE_DTYPES


class SinkGpuImpl(SinkImplBase[SinkGpuMetadata]):
    """One layer's attention in Triton."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SinkGpuMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write this step's K and V, then attend.

        Args:
            layer: Its ``_k_scale`` and ``_v_scale`` belong to an fp8 cache.
            query, output: [T, HQ, D]. key, value: [T, HKV, D].
            kv_cache: [B, HKV, N, 2D] in any of vLLM's layouts; K, then V.
            attn_metadata: None while vLLM profiles.
        """
        if output_scale is not None or output_block_scale is not None:
            raise ValueError(
                "output quantization must not be fused into attention with "
                "--attention-backend sink, got an output scale; turn off the "
                "fuse_attn_quant pass"
            )
        if attn_metadata is None:
            return output.zero_()
        plan = attn_metadata
        k_cache, v_cache = self._cache_views(kv_cache)
        k_scale, v_scale = 1.0, 1.0
        if self.kv_cache_dtype in FP8_KV_CACHE_DTYPES:
            k_scale, v_scale = layer._k_scale, layer._v_scale
        if self.writes_cache and key is not None:
            write_kv_cache(
                key, value, k_cache, v_cache, plan.slot_mapping, k_scale, v_scale
            )
        rotation = self.rotation
        settings: dict[str, Any] = {
            "scale": self.scale,
            "num_sink_tokens": plan.policy.num_sink_tokens,
            "window_size": plan.policy.window_size,
            "cos_sin_cache": None if rotation is None else rotation.cos_sin_cache,
            "is_neox": rotation is None or rotation.is_neox,
            "soft_cap": self.soft_cap,
            "sink_logits": self.sink_logits,
            "k_scale": k_scale,
            "v_scale": v_scale,
        }
        split, end = plan.num_decode_tokens, plan.num_tokens
        if split > 0:
            sink_decode(
                query[:split],
                k_cache,
                v_cache,
                plan.decode_block_table,
                plan.query_positions,
                plan.query_requests,
                output[:split],
                workspace=plan.workspace,
                **settings,
            )
        if split < end:
            if plan.has_prefill_padding:
                output[split:end].zero_()
            sink_prefill(
                query[split:end],
                k_cache,
                v_cache,
                plan.prefill_block_table,
                plan.prefill_start_loc,
                plan.prefill_seq_lens,
                plan.max_query_len,
                output[split:end],
                **settings,
            )
        return output

    def _cache_views(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [B, N, HKV, D] of the cache, by strides."""
        if self.kv_cache_dtype in FP8_KV_CACHE_DTYPES:
            kv_cache = kv_cache.view(current_platform.fp8_dtype())
        k_cache, v_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return k_cache, v_cache
