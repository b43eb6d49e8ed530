"""The CPU path: a step planned once, then attention in loops compiled by Numba."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionMetadata, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm_sink_kernels.cpu import attention, write

from vllm_sink.attention.base import SinkBuilderBase, SinkImplBase


@dataclass
class SinkCpuMetadata(AttentionMetadata):
    """One step's plan, shared by all layers of a KV cache group.

    Args:
        num_tokens: T, query tokens without padding.
        plan: The CPU path's plan.
        slots: [T] int64, where each token's K and V go.
        turns: id of a rotary table -> (cos, sin, is_neox) of the sink turn.
    """

    num_tokens: int
    plan: attention.Plan
    slots: torch.Tensor
    turns: dict[int, tuple[torch.Tensor, torch.Tensor, bool]]


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
        plan = attention.plan(
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
        return SinkCpuMetadata(
            num_tokens=num_tokens,
            plan=plan,
            slots=common.slot_mapping[:num_tokens],
            turns=turns,
        )


class SinkCpuImpl(SinkImplBase[SinkCpuMetadata]):
    """One layer's attention on the CPU."""

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
        blocks, heads, size, width = kv_cache.shape
        pages = kv_cache.view(blocks, heads, 2 * size, width // 2)
        if self.writes_cache and key is not None:
            write.write_kv(key, value, pages, attn_metadata.slots)
        turn = None
        if self.rotation is not None and attn_metadata.turns:
            turn = attn_metadata.turns[id(self.rotation.cos_sin_cache)]
        attention.attend(
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
