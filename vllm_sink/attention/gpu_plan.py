"""The GPU path's plan of a step.

No step waits for the device: sizes come from the host's copy of the batch, the
rest stays in tensors. A batch is split once, by the host's query lengths::

    requests   short, short, ... | long, short, ...
    kernel     decode (a token a program) | prefill (a tile of queries a program)

Both kernels are right for every batch, in any order; the split is for speed.
Their grids depend on padded token and request counts, on S + W and on the machine
alone, so a CUDA graph captured once replays any batch of its size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm_sink_kernels.triton.plan import map_tokens
from vllm_sink_kernels.triton.window import WindowView

from vllm_sink.attention.base import SinkBuilderBase, Step
from vllm_sink.attention.gpu_memory import long_stream_warning
from vllm_sink.policy.layout import RetentionPolicy

logger = init_logger("vllm.plugins.sink")

# Places at which a layer's block tables and slots may be found, one after another.
MAX_PLACES = 256


@dataclass
class SinkGpuMetadata(AttentionMetadata):
    """One step's plan, shared by all layers of a KV cache group.

    The first ``num_decode_tokens`` tokens (DT) belong to the first ``num_decodes``
    requests, which decode serves; the rest goes to prefill. T and R count padding.
    Layers whose heads are in several groups read the batch from any group's and
    block tables and slots from each head's own.

    Args:
        policy: S and W of these layers.
        num_tokens: T, query tokens.
        num_decode_tokens: DT.
        num_decodes: Requests that decode serves.
        slot_mapping: [T] int64, where K and V go; -1 for padding.
        block_table: [R, max_blocks] int32.
        query_start_loc: [R + 1] int32, first query of each request.
        seq_lens: [R] int32.
        query_positions, query_requests: [DT] int32, in buffers of the builder that
            CUDA graphs hold on to; position -1 for padding.
        has_prefill_padding: tokens past the last request may follow, whose output
            prefill leaves alone.
        max_query_len, max_seq_len: No request has more; the host's numbers.
        is_captured: A CUDA graph holds on to what is launched; other batches follow.
        window_view: What FlashAttention takes of the step, once a layer asked for it.
    """

    policy: RetentionPolicy
    num_tokens: int
    num_decode_tokens: int
    num_decodes: int
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    query_positions: torch.Tensor
    query_requests: torch.Tensor
    has_prefill_padding: bool
    max_query_len: int
    max_seq_len: int
    is_captured: bool
    window_view: WindowView | None = field(init=False, default=None, repr=False)
    step: Step = field(init=False, repr=False)


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
        self._prepared: set[Any] = set()
        warning = long_stream_warning(vllm_config)
        if warning is not None:
            logger.warning_once(warning)
        n = self.max_decode_tokens
        self._query_positions = torch.empty(n, dtype=torch.int32, device=device)
        self._query_requests = torch.empty(n, dtype=torch.int32, device=device)

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
        return self._plan(common, *decodes, has_padding=True, is_captured=True)

    def _plan(
        self,
        common: CommonAttentionMetadata,
        num_decodes: int,
        num_decode_tokens: int,
        *,
        has_padding: bool,
        is_captured: bool = False,
    ) -> SinkGpuMetadata:
        if common.causal is not True:
            raise ValueError(
                "attention must be causal with --attention-backend sink, got "
                f"causal={common.causal}; drop the flag for this model"
            )
        if num_decode_tokens > self.max_decode_tokens:
            num_decodes = num_decode_tokens = 0  # more than the buffers hold
        num_tokens, num_requests = common.num_actual_tokens, common.num_reqs
        metadata = SinkGpuMetadata(
            policy=self.policy,
            num_tokens=num_tokens,
            num_decode_tokens=num_decode_tokens,
            num_decodes=num_decodes,
            slot_mapping=common.slot_mapping[:num_tokens],
            block_table=common.block_table_tensor[:num_requests],
            query_start_loc=common.query_start_loc[: num_requests + 1],
            seq_lens=common.seq_lens[:num_requests],
            query_positions=self._query_positions[:num_decode_tokens],
            query_requests=self._query_requests[:num_decode_tokens],
            has_prefill_padding=has_padding,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            is_captured=is_captured,
        )
        if num_decode_tokens:
            map_tokens(
                metadata.query_start_loc,
                metadata.seq_lens,
                num_decodes,
                metadata.query_positions,
                metadata.query_requests,
            )
        step = self.join_step(common, metadata)
        if self.groups is not None and step.is_ready(self.is_drafters):
            self._prepare_heads(step)
        return metadata

    def _prepare_heads(self, step: Step) -> None:
        """See that every layer has the table for this step's block tables and slots.

        They stay where vLLM allocated them, so that there is work once. It waits for
        the device: a layer may run while a CUDA graph is captured, this does not.
        """
        assert self.groups is not None, "heads of one kind need no table"
        step.places = tuple(
            (part.block_table.data_ptr(), part.slot_mapping.data_ptr())
            for part in step.filled()
        )
        if step.places in self._prepared:
            return
        assert len(self._prepared) < MAX_PLACES, (
            "block tables and slot mappings must stay where vLLM allocated them"
        )
        self._prepared.add(step.places)
        heads = [head for group in self.groups.groups for head in group.heads]
        if not step.is_complete:
            heads = self.heads
        for impl in {owner.impl for head in heads for owner in head.owners}:
            if impl.heads is not None:
                impl.find_head_table(step)
