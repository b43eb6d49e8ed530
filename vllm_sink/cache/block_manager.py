"""The KV block manager that never evicts a sink block.

vLLM's base manager assumes that what attention skips is a *head* of the
request; here it is a gap in the middle. What is overridden below puts the sinks
back. Gap entries become the null block, so a block's index still tells its
position.

Every full block is cached. Which of the free ones is reused first, and why no
tail outlives its sinks, says :mod:`vllm_sink.cache.free_order`.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHashList,
    KVCacheBlock,
    resolve_block_hashes,
)
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.request import Request

from vllm_sink.cache.counted import CountedBlocks, OrderedBlocks, RetrievalManager
from vllm_sink.cache.spec import SinkSpec
from vllm_sink.policy.layout import cdiv


class SinkManager(CountedBlocks, OrderedBlocks, SlidingWindowManager):
    """Blocks of the layers under the sink policy (one KV cache group)."""

    retention_interval: int | None = None  # as of the latest block that was cached

    def __init__(self, kv_cache_spec: SinkSpec, **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.policy = kv_cache_spec.policy
        self.num_sink_blocks = self.policy.num_sink_blocks(self.block_size)
        if kv_cache_spec.is_retrieval:
            self.gauge = RetrievalManager.gauge
        self.resumed_at: dict[str, int] = {}  # tokens of a request's hit

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Length of the skipped *head*: none, the sinks stay.

        The base class's other users of this number are overridden below; 0 is
        the safe answer for any that a later vLLM adds.
        """
        return 0

    # -- allocation ---------------------------------------------------------

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Free blocks that the request needs to reach ``num_tokens``.

        A first allocation is charged for its new blocks and for the hit blocks
        that nobody holds yet (touching takes them out of the free queue). The
        admission cap bounds what the request *holds*, so the blocks of the hit
        count against it, and the gap of the hit does not.
        """
        num_required = cdiv(num_tokens, self.block_size)
        # Not num_cached_block: it has no entry before a first block is full.
        if row := self.req_to_blocks.get(request_id):
            assert not new_computed_blocks, "a running request has no new hits"
            num_new = max(num_required - len(row), 0)
            if apply_admission_cap and self.max_admission_blocks_per_request:
                # A session's next turn, or blocks that came from host memory.
                num_held = sum(not block.is_null for block in row)
                room = max(self.max_admission_blocks_per_request - num_held, 0)
                num_new = min(num_new, room)
            return num_new

        first, last = self.policy.gap_blocks(total_computed_tokens, self.block_size)
        num_held = num_required - (last - first)
        if apply_admission_cap and self.max_admission_blocks_per_request is not None:
            num_held = min(num_held, self.max_admission_blocks_per_request)
        hits = [*new_computed_blocks[:first], *new_computed_blocks[last:]]
        num_new = max(num_held - len(hits), 0)
        return num_new + self._get_num_evictable_blocks(hits)

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Adopt a prefix hit: touch sinks and tail, null the gap.

        The gap is that of all computed tokens: behind the hit may follow blocks that
        a KV connector brings.
        """
        req_blocks = self.req_to_blocks[request_id]
        assert not req_blocks, "only a first allocation adopts a prefix hit"
        num_computed = num_local_computed_tokens + num_external_computed_tokens
        first, last = self.policy.gap_blocks(num_computed, self.block_size)
        blocks = list(new_computed_blocks)
        last = min(last, len(blocks))
        if last > first:
            blocks[first:last] = [self._null_block] * (last - first)
        held = [block for block in blocks if not block.is_null]
        if self.metrics and held:
            self.metrics.add("vllm:sink_prefix_hits", 1)
            self.metrics.add("vllm:sink_prefix_hit_tokens", num_local_computed_tokens)
            self.count_live(blocks, references=0, sign=1)
        self.resumed_at[request_id] = num_computed
        if self.enable_caching:
            self.order.take_up(held)
            self.block_pool.touch(held)
        else:
            assert not held, "no hits while prefix caching is disabled"
        req_blocks.extend(blocks)
        self.num_cached_block[request_id] = len(req_blocks)

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        """Blocks for what a KV connector brings: sinks and window, and a null gap."""
        row = self.req_to_blocks[request_id]
        num_computed = num_local_computed_tokens + num_external_computed_tokens
        first, last = self.policy.gap_blocks(num_computed, self.block_size)
        start = len(row)
        end = cdiv(num_computed, self.block_size)
        count = end - start - max(min(last, end) - max(first, start), 0)
        self.order.make_way(count)
        new = self.block_pool.get_new_blocks(count)
        self.order.forget(new)
        given = iter(new)
        for index in range(start, end):
            row.append(self._null_block if first <= index < last else next(given))
        if record_for_zeroing and self.records_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in new)
        self.count_new(row, start)

    # -- eviction -----------------------------------------------------------

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free the blocks that lie wholly in the gap of the next query.

        Amortised O(1) a token: ``_remove_blocks_in_range`` walks back from the
        newest gap block and stops at the first that was freed before, and so does
        the walk before it.
        """
        first, last = self.policy.gap_blocks(processed_computed_tokens, self.block_size)
        row = self.req_to_blocks.get(request_id, ())
        start = last = min(last, len(row))
        while start > first and not row[start - 1].is_null:
            start -= 1
        leaving = row[start:last]
        free = self.block_pool.get_num_free_blocks()
        self._remove_blocks_in_range(request_id, first, last)
        if self.metrics and (freed := self.block_pool.get_num_free_blocks() - free):
            self.metrics.add("vllm:sink_evicted_blocks", freed)
            self.metrics.add(self.gauge, -freed)
        # What a user's retention interval keeps ages as vLLM's own checkpoints do.
        if not leaving or self.retention_interval:
            return
        points = [self.resumed_at.get(request_id, 0), (num_prompt_tokens or 0) - 1]
        for index, block in enumerate(leaving, start):
            if not any(self._serves_hit(index, point) for point in points):
                self.order.add_gap(block)
            elif block.block_hash is not None:
                self.retries[request_id].append((block.block_id, block.block_hash))

    def _serves_hit(self, index: int, num_tokens: int) -> bool:
        """Whether a hit of the whole blocks of ``num_tokens`` needs a gap's block."""
        end = num_tokens // self.block_size
        _, start = self.policy.gap_blocks(end * self.block_size, self.block_size)
        return start <= index < end + self.use_eagle  # a drafter drops the last

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.resumed_at.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    # -- prefix cache -------------------------------------------------------

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        self.retention_interval = retention_interval
        super().cache_blocks(
            request, num_tokens, retention_interval, replay_boundaries=replay_boundaries
        )

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Longest n (tokens) whose sink blocks and window blocks are cached.

        A hit of n tokens needs the blocks that hold a sink and those covering
        ``[n-W+1, n)``; the gap may be missing and comes back as null blocks.
        One pass from the right: linear in the prompt's blocks.
        """
        assert isinstance(kv_cache_spec, SinkSpec), type(kv_cache_spec)
        assert dcp_world_size == 1 and pcp_world_size == 1, (
            "context parallelism is refused at start; see start.checks"
        )
        block_size = kv_cache_spec.block_size
        policy = kv_cache_spec.policy
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        # vLLM 0.33's hashes may cover tokens behind the block: the last come later.
        num_blocks = min(max_length // block_size, len(hashes))
        num_sink_blocks = min(policy.num_sink_blocks(block_size), num_blocks)
        dropped = 1 if drop_eagle_block else 0

        def cached(index: int) -> list[KVCacheBlock] | None:
            return block_pool.get_cached_block(hashes[index], kv_cache_group_ids)

        def aligned(end: int) -> bool:
            return (end - dropped) * block_size % alignment_tokens == 0

        found: dict[int, list[KVCacheBlock]] = {}
        for index in range(num_sink_blocks):
            if (blocks := cached(index)) is None:
                break
            found[index] = blocks
        end = len(found)  # a hit that ends within the sinks needs them alone
        if end == num_sink_blocks:
            needed = policy.blocks_before_hit(block_size) + dropped
            run_end = None  # exclusive right edge of the run being grown
            for index in range(num_blocks - 1, num_sink_blocks - 1, -1):
                if needed == 0 and aligned(index + 1):
                    end = index + 1
                    break
                blocks = cached(index)
                if blocks is None:
                    run_end = None
                    continue
                if run_end is None:
                    if not aligned(index + 1):
                        continue
                    run_end = index + 1
                found[index] = blocks
                if run_end - index >= needed:
                    end = run_end
                    break
            else:
                # No full window of blocks: what is left of a run that reaches
                # down to the sinks is a whole prefix, and a hit all the same.
                end = run_end if run_end is not None else num_sink_blocks
        while end > 0 and not aligned(end):
            end -= 1
        end = max(end - dropped, 0)
        null = block_pool.null_block
        first, last = policy.gap_blocks(end * block_size, block_size)
        hit = tuple(
            [
                null if first <= index < last else found[index][group]
                for index in range(end)
            ]
            for group in range(len(kv_cache_group_ids))
        )
        return hit, end * block_size

    @classmethod
    def reachable_block_mask(
        cls,
        start_block: int,
        end_block: int,
        alignment_tokens: int | None,
        kv_cache_spec: KVCacheSpec,
        use_eagle: bool,
        retention_interval: int | None = None,
        reachable_boundaries: Sequence[int] = (),
        dcp_world_size: int = 1,
        final_segment_end_block: int | None = None,
    ) -> list[bool] | None:
        """Which full blocks are cached: all, unless a user gives an interval.

        vLLM's default, 0, would cache the tail of each prompt and nothing else of
        it: what is said in answer would be computed anew at the next turn. It is
        made for windows beside full attention, which learn the prefixes that
        prompts share from those layers. None means dense in vLLM, too. Nothing in
        vLLM's configuration tells a 0 that a user gives from the default: for vLLM's
        meaning of 0 give an interval that is longer than any request.
        """
        assert isinstance(kv_cache_spec, SinkSpec), type(kv_cache_spec)
        if not retention_interval:
            return None
        mask = super().reachable_block_mask(
            start_block,
            end_block,
            alignment_tokens,
            kv_cache_spec,
            use_eagle,
            retention_interval,
            reachable_boundaries,
            dcp_world_size,
            final_segment_end_block,
        )
        if mask is None:
            return None
        num_sink_blocks = kv_cache_spec.policy.num_sink_blocks(kv_cache_spec.block_size)
        for index in range(start_block, min(num_sink_blocks, end_block)):
            mask[index - start_block] = True
        return mask
