"""The GPU path's plan of a step.

No step waits for the device: sizes come from the host's copy of the batch, the
rest stays in tensors. A batch is split once, by the host's query lengths::

    requests   short, short, ... | long, short, ...
    kernel     decode (a token a program) | prefill (a tile of queries a program)

Both kernels are right for every batch, in any order; the split is for speed.
Their grids depend on padded token and request counts and on S + W alone, so a
CUDA graph captured once replays any batch of its size.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm_sink_kernels.triton.decode import workspace_shape

from vllm_sink.attention.base import SinkBuilderBase
from vllm_sink.policy.layout import RetentionPolicy

# (device, elements) -> scratch of decode's splits. Builders of one process share
# it: their layers run one after another on one stream.
_workspaces: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def _shared_workspace(elements: int, device: torch.device) -> torch.Tensor:
    key = device, elements
    workspace = _workspaces.get(key)
    if workspace is None:
        workspace = torch.empty(elements, dtype=torch.float32, device=device)
        _workspaces[key] = workspace
    return workspace


@dataclass
class SinkGpuMetadata(AttentionMetadata):
    """One step's plan, shared by all layers of a KV cache group.

    The first ``num_decode_tokens`` tokens (DT) belong to the first requests (DR),
    which decode serves; the rest (PT, PR) goes to prefill. T counts padding.

    Args:
        policy: S and W of these layers.
        num_tokens: T = DT + PT, query tokens.
        num_decode_tokens: DT.
        slot_mapping: [T] int64, where K and V go; -1 for padding.
        decode_block_table: [DR, max_blocks] int32.
        query_positions, query_requests: [DT] int32, in buffers of the builder that
            CUDA graphs hold on to; position -1 for padding.
        prefill_block_table: [PR, max_blocks] int32.
        prefill_start_loc: [PR + 1] int32, first query of each request, from DT on.
        prefill_seq_lens: [PR] int32.
        max_query_len: tokens of the longest request, or more.
        has_prefill_padding: tokens past the last request may follow, whose output
            prefill leaves alone.
        workspace: scratch of decode.
    """

    policy: RetentionPolicy
    num_tokens: int
    num_decode_tokens: int
    slot_mapping: torch.Tensor
    decode_block_table: torch.Tensor
    query_positions: torch.Tensor
    query_requests: torch.Tensor
    prefill_block_table: torch.Tensor
    prefill_start_loc: torch.Tensor
    prefill_seq_lens: torch.Tensor
    max_query_len: int
    has_prefill_padding: bool
    workspace: torch.Tensor


class SinkGpuMetadataBuilder(SinkBuilderBase[SinkGpuMetadata]):
    """Plans a step once for all layers of a group, without waiting for the device.

    ``supports_update_block_table`` stays off: it would hand one builder's metadata
    to another's layers, whose CUDA graphs read the other builder's buffers.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Verifying speculated tokens is decode, too.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        assert self.reorder_batch_threshold is not None
        scheduler = vllm_config.scheduler_config
        max_tokens = max(
            scheduler.max_num_batched_tokens,
            vllm_config.compilation_config.max_cudagraph_capture_size or 0,
        )
        self.max_decode_tokens = min(
            max_tokens, scheduler.max_num_seqs * self.reorder_batch_threshold
        )
        # No distance reaches max_model_len: a larger window is the same window.
        self.policy = RetentionPolicy(
            self.policy.num_sink_tokens,
            min(self.policy.window_size, vllm_config.model_config.max_model_len),
        )
        n = self.max_decode_tokens
        self._tokens = torch.arange(n, dtype=torch.int32, device=device)
        self._query_positions = torch.empty(n, dtype=torch.int32, device=device)
        self._query_requests = torch.empty(n, dtype=torch.int32, device=device)
        elements = max(
            workspace_shape(
                n,
                layer.impl.num_heads,
                layer.impl.head_size,
                self.policy.num_sink_tokens,
                self.policy.window_size,
            )[0]
            for layer in self.layers.values()
        )
        self._workspace = _shared_workspace(elements, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SinkGpuMetadata:
        common = common_attn_metadata
        # Reads host memory only: query_start_loc_cpu and integers.
        num_decodes, _, num_decode_tokens, _ = split_decodes_and_prefills(
            common, decode_threshold=self.reorder_batch_threshold
        )
        num_queries = int(common.query_start_loc_cpu[common.num_reqs])
        return self._plan(
            common,
            num_decodes,
            num_decode_tokens,
            has_padding=num_queries < common.num_actual_tokens,
        )

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> SinkGpuMetadata:
        """One kernel for the whole batch: the graph replays other splits."""
        common = common_attn_metadata
        assert self.reorder_batch_threshold is not None
        if common.max_query_len <= self.reorder_batch_threshold:
            decodes = common.num_reqs, common.num_actual_tokens
        else:
            decodes = 0, 0
        return self._plan(common, *decodes, has_padding=True)

    def _plan(
        self,
        common: CommonAttentionMetadata,
        num_decodes: int,
        num_decode_tokens: int,
        *,
        has_padding: bool,
    ) -> SinkGpuMetadata:
        if common.causal is not True:
            raise ValueError(
                "attention must be causal with --attention-backend sink, got "
                f"causal={common.causal}; drop the flag for this model"
            )
        if num_decode_tokens > self.max_decode_tokens:
            num_decodes = num_decode_tokens = 0  # more than the workspace holds
        num_tokens = common.num_actual_tokens
        start_loc = common.query_start_loc[: common.num_reqs + 1]
        seq_lens = common.seq_lens[: common.num_reqs]
        block_table = common.block_table_tensor[: common.num_reqs]
        if num_decode_tokens:
            self._map_tokens(
                start_loc[: num_decodes + 1], seq_lens[:num_decodes], num_decode_tokens
            )
        prefill_start_loc = start_loc[num_decodes:]
        if num_decode_tokens:
            prefill_start_loc = prefill_start_loc - num_decode_tokens
        return SinkGpuMetadata(
            policy=self.policy,
            num_tokens=num_tokens,
            num_decode_tokens=num_decode_tokens,
            slot_mapping=common.slot_mapping[:num_tokens],
            decode_block_table=block_table[:num_decodes],
            query_positions=self._query_positions[:num_decode_tokens],
            query_requests=self._query_requests[:num_decode_tokens],
            prefill_block_table=block_table[num_decodes:],
            prefill_start_loc=prefill_start_loc,
            prefill_seq_lens=seq_lens[num_decodes:],
            max_query_len=common.max_query_len,
            has_prefill_padding=has_padding,
            workspace=self._workspace,
        )

    def _map_tokens(
        self, start_loc: torch.Tensor, seq_lens: torch.Tensor, num_tokens: int
    ) -> None:
        """Position and request of the first ``num_tokens`` tokens, into the buffers.

        Args:
            start_loc: [R + 1] int32; empty requests repeat their neighbour's start,
                tokens from ``start_loc[R]`` on are padding.
            seq_lens: [R] int32.
        """
        tokens = self._tokens[:num_tokens]
        requests = self._query_requests[:num_tokens]
        positions = self._query_positions[:num_tokens]
        ends = start_loc[1:].contiguous()
        # The first request that ends after the token: never an empty one.
        torch.searchsorted(ends, tokens, right=True, out_int32=True, out=requests)
        requests.clamp_(max=seq_lens.shape[0] - 1)
        torch.add((seq_lens - ends).index_select(0, requests), tokens, out=positions)
        positions.masked_fill_(tokens >= start_loc[-1:], -1)
