"""What each worker of an engine keeps in slots: heads of two kinds, and a drafter's.

A worker is a tensor-parallel rank of a pipeline stage. The heads of a drafter are
beside the last stage's, in slots of their own: the last ones of the last group of
their kind, so that they share one block table (:mod:`vllm_sink.policy.draft_heads`)::

    stage 0   [0 1 2 3 | 4 5 6 7 | 8 - - -]      numbers: slots of the model's heads
    stage 1   [0 1 2 3 | 4 5 6 - | - - D D]      D: of the drafter's   -: padding
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vllm_sink.policy.draft_heads import DraftHeads
from vllm_sink.policy.grouping import heads_of_workers
from vllm_sink.policy.head_map import HeadMap, heads_of_rank
from vllm_sink.policy.layout import cdiv


class SlotHeads(NamedTuple):
    """The heads of one worker, or its layers where these have slots as a whole.

    Args:
        retrieval, streaming: The model's, of each kind.
        drafted: (retrieval, streaming) among a drafter's.
    """

    retrieval: int
    streaming: int
    drafted: tuple[int, int] = (0, 0)

    @property
    def counts(self) -> tuple[int, int]:
        """(retrieval, streaming), a drafter's included."""
        return self.retrieval + self.drafted[0], self.streaming + self.drafted[1]

    def num_slots(self, heads_per_slot: int) -> tuple[int, int]:
        """Slots that they fill, of each kind."""
        own = self.retrieval, self.streaming
        retrieval, streaming = (
            cdiv(count, heads_per_slot) + cdiv(drafted, heads_per_slot)
            for count, drafted in zip(own, self.drafted, strict=True)
        )
        return retrieval, streaming


# By the worker's stage and the KV heads that it holds of each layer.
SlotWorkers = dict[tuple[int, range], SlotHeads]


def is_divided(
    heads: HeadMap, num_stages: int = 1, draft: DraftHeads | None = None
) -> bool:
    """Whether slots hold heads, and not whole layers.

    Where no layer is split, vLLM divides the layers into groups by its own rule. It
    knows nothing of stages that need as many, or of layers that need one block table.
    """
    return heads.splits_layers or num_stages > 1 or draft is not None


def slots_of_workers(
    heads: HeadMap,
    num_ranks: int,
    stages: Sequence[range] = (),
    draft: DraftHeads | None = None,
) -> SlotWorkers:
    """The heads of each worker; layers where :func:`is_divided` says no.

    Args:
        num_ranks: Tensor-parallel ranks.
        stages: The layers of each pipeline stage; left out: one has all.
    """
    divided = is_divided(heads, max(len(stages), 1), draft)
    workers = heads_of_workers(heads, num_ranks, stages, is_divided=divided)
    last = max(stage for stage, _ in workers.counts)
    found = {}
    for (stage, held), (retrieval, streaming) in workers.counts.items():
        drafted = 0, 0
        if draft is not None and stage == last:
            drafted = drafted_of_rank(draft, num_ranks)
        found[stage, held] = SlotHeads(retrieval, streaming, drafted)
    return found


def drafted_of_rank(draft: DraftHeads, num_ranks: int) -> tuple[int, int]:
    """(retrieval, streaming) among a drafter's heads on a rank: as many on each."""
    held = heads_of_rank(0, num_ranks, draft.num_kv_heads)
    count = draft.num_layers * len(held)
    return (count, 0) if draft.is_retrieval else (0, count)


def most_slots(workers: Iterable[SlotHeads], heads_per_slot: int) -> tuple[int, int]:
    """The most slots of each kind that a worker fills."""
    needed = [heads.num_slots(heads_per_slot) for heads in workers]
    return max(count for count, _ in needed), max(count for _, count in needed)


def most_drafted(workers: Iterable[SlotHeads], heads_per_slot: int) -> int:
    """The most slots that a drafter's heads fill on a worker."""
    return max(cdiv(sum(heads.drafted), heads_per_slot) for heads in workers)
