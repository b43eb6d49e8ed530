"""What all our block managers do: count blocks for ``/metrics``, keep their order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
)
from vllm.v1.request import Request

from vllm_sink.cache.free_order import Cached, FreeOrder
from vllm_sink.cache.metrics import metrics
from vllm_sink.policy.layout import cdiv


class CountedBlocks(SingleTypeKVCacheManager):
    """Counts the blocks that it gives and takes; a mix-in.

    Attributes:
        gauge: Name of the metric of this kind of heads.
        num_sink_blocks: The first blocks of a row, counted apart; 0 has none.
    """

    gauge = "vllm:sink_live_blocks"
    num_sink_blocks = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.metrics = metrics()

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        new = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        row = self.req_to_blocks[request_id]
        self.count_new(row, len(row) - len(new))
        return new

    def count_new(self, row: Sequence[KVCacheBlock], start: int) -> None:
        """Count blocks that a request was given, from the row's index ``start`` on."""
        if not self.metrics or start >= len(row):
            return
        new = [not block.is_null for block in row[start:]]
        self.metrics.add(self.gauge, sum(new))
        sinks = sum(new[: max(self.num_sink_blocks - start, 0)])
        self.metrics.add("vllm:sink_pinned_blocks", sinks)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        blocks = super().pop_blocks_for_free(request_id)
        if self.metrics:
            self.count_live(blocks, references=1, sign=-1)
        return blocks

    def count_live(
        self, row: Sequence[KVCacheBlock], *, references: int, sign: int
    ) -> None:
        """Count those of a row's blocks that nobody else holds."""
        assert self.metrics is not None
        own = [not b.is_null and b.ref_cnt == references for b in row]
        self.metrics.add(self.gauge, sign * sum(own))
        sinks = sum(own[: self.num_sink_blocks])
        self.metrics.add("vllm:sink_pinned_blocks", sign * sinks)


class OrderedBlocks(SingleTypeKVCacheManager):
    """Takes the pool's free blocks of least worth first; a mix-in.

    The manager itself tells :attr:`order` of hits and of gaps.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.order = FreeOrder.of(self.block_pool)
        # Of running requests: blocks of the gap that their prompts may hit again.
        self.retries: defaultdict[str, list[Cached]] = defaultdict(list)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        held = len(self.req_to_blocks[request_id])
        if (count := cdiv(num_tokens, self.block_size) - held) > 0:
            self.order.make_way(count)
        new = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        self.order.forget(new)
        return new

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        row = self.req_to_blocks[request_id]
        held = len(row)
        num_computed = num_local_computed_tokens + num_external_computed_tokens
        missing = cdiv(num_computed, self.block_size) - held
        self.order.make_way(max(missing, 0))
        super().allocate_external_computed_blocks(
            request_id,
            num_local_computed_tokens,
            num_external_computed_tokens,
            record_for_zeroing,
        )
        self.order.forget(row[held:])

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        before = self.num_cached_block.get(request.request_id, 0)
        super().cache_blocks(
            request, num_tokens, retention_interval, replay_boundaries=replay_boundaries
        )
        # The last block that the prompt hits when it is sent anew.
        last = (request.num_prompt_tokens - 1) // self.block_size - 1
        if before <= last < self.num_cached_block.get(request.request_id, 0):
            self.order.end_at(self.req_to_blocks[request.request_id][last], [])

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        row = super().pop_blocks_for_free(request_id)
        self.order.leave(row)
        retries = self.retries.pop(request_id, [])
        for block in reversed(row):
            if block.block_hash is not None:
                self.order.end_at(block, retries)
                break
        return row


class RetrievalManager(CountedBlocks, OrderedBlocks, FullAttentionManager):
    """vLLM's manager of full attention, counted: heads that keep everything."""

    gauge = "vllm:sink_retrieval_blocks"

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        if self.metrics:
            self.count_live(new_computed_blocks, references=0, sign=1)
        self.order.take_up(new_computed_blocks)
        super().add_local_computed_blocks(
            request_id,
            new_computed_blocks,
            num_local_computed_tokens,
            num_external_computed_tokens,
        )

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        start = len(self.req_to_blocks[request_id])
        super().allocate_external_computed_blocks(
            request_id,
            num_local_computed_tokens,
            num_external_computed_tokens,
            record_for_zeroing,
        )
        self.count_new(self.req_to_blocks[request_id], start)
