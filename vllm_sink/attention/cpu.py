"""The CPU path: a step planned once, then attention in loops compiled by Numba."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionMetadata, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm_sink_kernels.cpu import attention, write
from vllm_sink_kernels.cpu.heads import HeadCaches
from vllm_sink_kernels.cpu.rows import Kind, Slots, Turns

from vllm_sink.attention.base import SinkBuilderBase, SinkImplBase


@dataclass
class SinkCpuMetadata(AttentionMetadata):
    """One step's plan, shared by all layers of a KV cache group.

    Args:
        num_tokens: T, query tokens without padding.
        plan: The CPU path's plan.
        slots: Where each token's K and V go.
        turns: id of a rotary table -> the sink turn.
    """

    num_tokens: int
    plan: attention.Plan
    slots: Slots
    turns: dict[int, Turns]


class SinkCpuMetadataBuilder(SinkBuilderBase[SinkCpuMetadata]):
    """Plans a step once for all layers of a group."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        attention.compile_for(kv_cache_spec.dtype)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SinkCpuMetadata:
        common = common_attn_metadata
        num_tokens = common.num_actual_tokens
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        seq_lens = common.seq_lens[: common.num_reqs].tolist()
        kind = Kind(
            common.block_table_tensor,
            self.policy.num_sink_tokens,
            self.policy.window_size,
        )
        plan = attention.plan([kind], starts, seq_lens, block_size=self.block_size)
        turns = {}
        if self.rotations and max(seq_lens, default=0) > self.policy.budget:
            # Of a request that ends in row e at length n, row r is at n - e + r.
            ends = torch.tensor(starts[1:])
            offsets = torch.tensor(seq_lens) - ends
            positions = torch.arange(num_tokens) + offsets.repeat_interleave(
                ends - torch.tensor(starts[:-1])
            )
            turns = {
                key: Turns(
                    (rotation.turn(positions, self.policy.budget),), rotation.is_neox
                )
                for key, rotation in self.rotations.items()
            }
        return SinkCpuMetadata(
            num_tokens=num_tokens,
            plan=plan,
            slots=Slots.of_kinds([common.slot_mapping[:num_tokens]]),
            turns=turns,
        )


class SinkCpuImpl(SinkImplBase[SinkCpuMetadata]):
    """One layer's attention on the CPU."""

    _caches: HeadCaches | None = None

    def forward(
        self,
        layer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SinkCpuMetadata | None,
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
        caches = self._head_caches(kv_cache)
        if self.writes_cache and key is not None:
            write.write_kv(key, value, caches, attn_metadata.slots)
        turns = None
        if self.rotation is not None and attn_metadata.turns:
            turns = attn_metadata.turns[id(self.rotation.cos_sin_cache)]
        attention.attend(
            query[:n],
            caches,
            attn_metadata.plan,
            output[:n],
            scale=self.scale,
            turns=turns,
            soft_cap=self.soft_cap,
            sink_logits=self.sink_logits,
        )
        return output

    def _head_caches(self, kv_cache: torch.Tensor) -> HeadCaches:
        """Made once: the cache of a layer stays where it is."""
        known = self._caches
        if known is None or known.tensors[0].data_ptr() != kv_cache.data_ptr():
            blocks, heads, size, width = kv_cache.shape
            pages = kv_cache.view(blocks, heads, 2 * size, width // 2)
            known = self._caches = HeadCaches.of_layer(pages)
        return known
