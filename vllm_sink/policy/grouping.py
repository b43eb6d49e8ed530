"""Groups of heads of two policies in one pool of blocks: pure arithmetic.

vLLM's pool has blocks of one size: the pages of ``size`` heads for some tokens. A
*group* is ``size`` heads of one policy with one block table. Every worker has the
same groups, whatever heads it holds; a place in a group without a head costs no
tensor of its own, but its share of the group's blocks is never used::

    group     block of the pool
    retrieval [head 3 | head 7 | head 8 ]
    streaming [head 0 | head 1 | head 2 ]
    streaming [head 4 | head 5 | padding]

A worker is a tensor-parallel rank of a pipeline stage. A drafter's heads are beside
the last stage's, in one group (:mod:`vllm_sink.policy.draft_heads`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_sink.policy.draft_heads import DraftHeads
from vllm_sink.policy.head_map import HeadMap, heads_of_rank
from vllm_sink.policy.layout import RetentionPolicy, cdiv

# Each group costs time in the scheduler and in the planning of a step.
MAX_GROUPS = 8
# Request length, in budgets, that the grouping is optimised for.
LENGTHS_IN_BUDGETS = 8


@dataclass(frozen=True)
class Grouping:
    """Groups of equal size; see :func:`choose_grouping`.

    Args:
        size: Heads of a group (or layers, where no layer is split).
        num_retrieval, num_streaming: Groups of each kind.
    """

    size: int
    num_retrieval: int
    num_streaming: int

    @property
    def num_groups(self) -> int:
        return self.num_retrieval + self.num_streaming

    def padding(self, num_retrieval: int, num_streaming: int) -> tuple[int, int]:
        """Empty places of each kind on a worker that holds so many heads."""
        return (
            self.num_retrieval * self.size - num_retrieval,
            self.num_streaming * self.size - num_streaming,
        )

    def num_of_kind(self, is_retrieval: bool) -> int:
        """Groups of a kind."""
        return self.num_retrieval if is_retrieval else self.num_streaming

    def request_blocks(self, retrieval_blocks: int, streaming_blocks: int) -> int:
        """Pool blocks of a request with so many in a group of each kind."""
        return (
            self.num_retrieval * retrieval_blocks
            + self.num_streaming * streaming_blocks
        )


def choose_grouping(
    counts: Iterable[tuple[int, int]], num_draft_heads: int = 0
) -> Grouping:
    """The groups that hold a long request in the least memory.

    One kind has a single group: vLLM groups by the smaller kind's size, and would
    undo a finer division.

    Args:
        counts: (retrieval heads, streaming heads) of each worker.
        num_draft_heads: How many of a worker's must fit into one group.
    """
    counts = list(counts)
    retrieval = max(count for count, _ in counts)
    streaming = max(count for _, count in counts)
    if not retrieval or not streaming:
        size = max(retrieval, streaming)
        return Grouping(size, int(retrieval > 0), int(streaming > 0))
    least = max(min(retrieval, streaming), num_draft_heads)
    options = [
        Grouping(size, cdiv(retrieval, size), cdiv(streaming, size))
        for size in range(least, max(retrieval, streaming) + 1)
    ]
    return min(
        (option for option in options if option.num_groups <= MAX_GROUPS),
        key=lambda option: (
            option.size * option.request_blocks(LENGTHS_IN_BUDGETS, 1),
            option.num_groups,
        ),
    )


@dataclass(frozen=True)
class Workers:
    """What each worker of an engine holds.

    Tensor-parallel ranks that hold the same heads are one worker here.

    Args:
        counts: (retrieval heads, streaming heads) by the worker's pipeline stage and
            its KV heads. Layers are counted where no layer is split: by ``range(1)``.
        num_draft_heads: Of them a drafter's, on one worker.
    """

    counts: dict[tuple[int, range], tuple[int, int]]
    num_draft_heads: int = 0

    @property
    def grouping(self) -> Grouping:
        return choose_grouping(self.counts.values(), self.num_draft_heads)


def heads_of_workers(
    heads: HeadMap,
    num_ranks: int,
    stages: Sequence[range] = (),
    draft: DraftHeads | None = None,
    *,
    is_divided: bool | None = None,
) -> Workers:
    """The heads of each worker.

    Args:
        num_ranks: Tensor-parallel ranks.
        stages: The layers of each pipeline stage; left out: one has all.
        is_divided: As for :func:`heads_held`.
    """
    stages = stages or [range(heads.num_layers)]
    counts, num_draft_heads = {}, 0
    for rank in range(num_ranks):
        held = heads_held(heads, num_ranks, rank, is_divided=is_divided)
        for stage, layers in enumerate(stages):
            rows = [heads.is_retrieval[i] for i in layers]
            # A layer that the policy doesn't govern has an empty row.
            kinds = [row[head] for row in rows if row for head in held]
            retrieval, streaming = sum(kinds), len(kinds) - sum(kinds)
            if draft is not None and stage == len(stages) - 1:
                num_draft_heads = draft.num_layers
                if heads.splits_layers:
                    num_draft_heads *= len(
                        heads_of_rank(rank, num_ranks, draft.num_kv_heads)
                    )
                retrieval += num_draft_heads * draft.is_retrieval
                streaming += num_draft_heads * (not draft.is_retrieval)
            counts[stage, held] = retrieval, streaming
    return Workers(counts, num_draft_heads)


def heads_held(
    heads: HeadMap, num_ranks: int, rank: int, *, is_divided: bool | None = None
) -> range:
    """The KV heads of a rank, in each of its layers; the first where none is split.

    Args:
        is_divided: Heads are counted. None: only where a layer is split, else layers.
    """
    if not (heads.splits_layers if is_divided is None else is_divided):
        return range(1)
    return heads_of_rank(rank, num_ranks, heads.num_kv_heads)


@dataclass(frozen=True)
class RequestMemory:
    """Memory of one request on a worker whose heads are of two kinds.

    Args:
        grouping: The worker's groups.
        num_heads: Its heads (or layers, where no layer is split), padding excepted.
        head_bytes: Bytes of a block's tokens in one of them.
        block_size: Tokens a block.
        streaming: The streaming heads' policy.
        retrieval: The retrieval heads'; None keeps everything.
    """

    grouping: Grouping
    num_heads: int
    head_bytes: int
    block_size: int
    streaming: RetentionPolicy
    retrieval: RetentionPolicy | None = None

    @property
    def pool_block_bytes(self) -> int:
        """Bytes of one block of the pool."""
        return self.grouping.size * self.head_bytes

    def blocks(self, num_tokens: int, in_flight_tokens: int = 1) -> int:
        """Most pool blocks of a request of ``num_tokens``, prompt and answer."""

        def held(policy: RetentionPolicy | None) -> int:
            if policy is None:
                return cdiv(num_tokens, self.block_size)
            return policy.max_blocks(in_flight_tokens, num_tokens, self.block_size)

        return self.grouping.request_blocks(held(self.retrieval), held(self.streaming))

    def bytes(self, num_tokens: int, in_flight_tokens: int = 1) -> int:
        return self.pool_block_bytes * self.blocks(num_tokens, in_flight_tokens)

    def dense_bytes(self, num_tokens: int) -> int:
        """Bytes of a request under stock attention, in its own groups."""
        return self.num_heads * self.head_bytes * cdiv(num_tokens, self.block_size)
