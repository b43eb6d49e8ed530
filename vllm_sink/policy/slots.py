"""Groups of heads of two policies in a pool that other layers share: arithmetic.

Layers that the policy doesn't govern (windows of their own, states) have groups in the
same pool, whose pages are all as large as theirs. A *slot* is one page: it holds some
heads for some tokens, ``heads_per_slot * tokens_per_block`` of them. A group is
``size`` slots, or ``size`` layers, with one block table::

    group     block of the pool
    retrieval [heads 3, 7 | heads 8, padding]
    streaming [heads 0, 1 | heads 2, 4      ]
    window    [layer 0    | layer 2         ]
    window    [layer 4    | padding         ]

Pipeline stages have slots of their own names, as many on each: to vLLM a group has the
layers of all stages. What a worker keeps in them: :mod:`vllm_sink.policy.slot_workers`.
Where the policy governs all layers: :mod:`vllm_sink.policy.grouping`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from vllm_sink.policy.head_map import HeadMap
from vllm_sink.policy.layout import RetentionPolicy, cdiv
from vllm_sink.policy.slot_workers import SlotHeads, most_drafted, most_slots

# Each group costs time in the scheduler and in the planning of a step.
MAX_GROUPS = 16
# Request length that the grouping is optimised for, in tokens.
LENGTH = 32_768
# Memory that a grouping with fewer groups may take more than the best.
SLACK = 1.05
# Tokens of a block are a multiple of this: the kernels' tiles.
GRANULE = 16


@dataclass(frozen=True)
class LayersBeside:
    """Layers of one kind that the policy doesn't govern, on one worker.

    Args:
        num_layers: How many.
        block_size: Tokens a block of theirs; 0 of states.
        window: Tokens of their own window; None where they hold ``num_states``.
        num_states: Blocks that a request holds, whatever its length (Mamba).
        num_checkpoints: Blocks that it holds besides while it prefills.
        kept_bytes: What one layer keeps: of a token, or of all states.
        of_stages: How many on each pipeline stage; empty: there is one.
    """

    num_layers: int
    block_size: int
    window: int | None = None
    num_states: int = 0
    num_checkpoints: int = 0
    kept_bytes: int = 0
    of_stages: tuple[int, ...] = ()

    @property
    def num_everywhere(self) -> int:
        """How many on all stages together."""
        return sum(self.of_stages) or self.num_layers

    @property
    def most(self) -> int:
        """The most of a stage."""
        return max(self.of_stages, default=self.num_layers)

    def blocks(self, num_tokens: int, in_flight_tokens: int) -> int:
        """Most blocks of a request in one group."""
        if self.window is None:
            is_prefill = in_flight_tokens > 1
            return self.num_states + self.num_checkpoints * is_prefill
        own = RetentionPolicy(0, self.window)
        return own.max_blocks(in_flight_tokens, num_tokens, self.block_size)

    def bytes_kept(self, num_tokens: int) -> int:
        """Bytes of what all layers keep, without blocks."""
        tokens = 1 if self.window is None else min(self.window, num_tokens)
        return self.num_layers * self.kept_bytes * tokens


@dataclass(frozen=True)
class SlotGrouping:
    """Groups of equal size; see :func:`choose_slots`.

    Args:
        size: Slots of a group, or layers, on each pipeline stage.
        num_retrieval, num_streaming: Groups of each kind of heads.
        num_beside: Groups of each kind of layers beside.
        heads_per_slot: Heads of a slot, or layers of it: one.
        tokens_per_block: Tokens a block of theirs.
    """

    size: int
    num_retrieval: int
    num_streaming: int
    num_beside: tuple[int, ...]
    heads_per_slot: int
    tokens_per_block: int

    @property
    def num_groups(self) -> int:
        return self.num_retrieval + self.num_streaming + sum(self.num_beside)

    def num_slots(self, is_retrieval: bool) -> int:
        """Slots of one kind, on every worker."""
        return self.size * (self.num_retrieval if is_retrieval else self.num_streaming)

    def width(self, num_beside: Sequence[int]) -> int:
        """Pages of a block of the pool: of the widest group of a worker.

        vLLM deals the layers of a kind out to its groups in turn.

        Args:
            num_beside: The worker's layers beside, of each kind.
        """
        dealt = map(cdiv, num_beside, self.num_beside)
        return max([self.size, *dealt])

    def request_blocks(
        self, retrieval_blocks: int, streaming_blocks: int, beside: Sequence[int]
    ) -> int:
        """Pool blocks of a request with so many in a group of each kind."""
        return (
            self.num_retrieval * retrieval_blocks
            + self.num_streaming * streaming_blocks
            + sum(n * b for n, b in zip(self.num_beside, beside, strict=True))
        )


def has_layers_beside(is_hybrid: bool, heads: HeadMap) -> bool:
    """Whether other layers share the pool, or some read another's keys.

    Args:
        is_hybrid: Some layers have states, maybe beside attention in the same layer.
    """
    return is_hybrid or not all(heads.is_retrieval)


def vllm_group_size(counts: Iterable[int]) -> int:
    """Layers of a group, of kinds with so many: the rule of vLLM 0.32 and 0.33.

    The fewest; the most, where all are within half of each other.
    """
    counts = list(counts)
    most, fewest = max(counts), min(counts)
    return most if most < 1.5 * fewest else fewest


def choose_slots(
    workers: Iterable[SlotHeads],
    beside: Sequence[LayersBeside],
    streaming: RetentionPolicy,
    retrieval: RetentionPolicy | None,
    *,
    slots: Iterable[tuple[int, int]],
    is_divided: bool = True,
    num_stages: int = 1,
) -> SlotGrouping:
    """The groups that hold a request of :data:`LENGTH` tokens in the least memory.

    Args:
        workers: The heads of each worker; or layers.
        beside: The layers beside, of each kind.
        streaming, retrieval: Policies; None keeps everything.
        slots: (heads, tokens) that a page of the pool may hold; of :func:`slots_of`.
        is_divided: vLLM is told of every group as of a kind of its own, so that it
            makes a group of each, of any size. False: of two kinds, which it divides.
        num_stages: Pipeline stages; vLLM groups the layers of all together.

    Raises:
        ValueError: A drafter's heads don't fit into one group.
    """
    workers = list(workers)
    everywhere = [layers.num_everywhere for layers in beside]
    options: list[tuple[int, int, int, SlotGrouping]] = []
    for heads, tokens in slots:
        needed = most_slots(workers, heads)
        least = max(most_drafted(workers, heads), 1)
        besides = [layers.blocks(LENGTH, 1) for layers in beside]
        for size in range(least, max(*needed, *everywhere) + 1):
            num_retrieval, num_streaming = (cdiv(count, size) for count in needed)
            whole = size * num_stages
            kinds = [whole] * (num_retrieval + num_streaming)
            if not is_divided:
                kinds = [size * n for n in (num_retrieval, num_streaming) if n]
            kinds += everywhere
            if vllm_group_size(kinds) != whole:
                continue
            grouping = SlotGrouping(
                size,
                num_retrieval,
                num_streaming,
                tuple(cdiv(count, whole) for count in everywhere),
                heads,
                tokens,
            )
            width = grouping.width([layers.most for layers in beside])
            pages = width * grouping.request_blocks(
                held_blocks(retrieval, LENGTH, 1, tokens),
                held_blocks(streaming, LENGTH, 1, tokens),
                besides,
            )
            options.append((pages, grouping.num_groups, -tokens, grouping))
    if not options:
        raise ValueError(
            "speculative_config.model must have KV heads that fit into one group "
            f"beside the model's other layers, got {sum(workers[-1].drafted)} beside "
            f"{min(everywhere)} layers; draft with n-grams or drop --speculative-config"
        )
    few = [option for option in options if option[1] <= MAX_GROUPS]
    if not few:
        return min(options, key=lambda option: option[1:3])[3]
    best = min(few)[0]
    near = [option for option in few if option[0] <= SLACK * best]
    return min(near, key=lambda option: (option[1], option[0], option[2]))[3]


def slots_of(
    page_bytes: int, token_bytes: int, block_size: int
) -> Iterator[tuple[int, int]]:
    """(heads, tokens) that fit a page of the pool.

    The tokens divide the engine's block size or are a multiple of it: prefix hits,
    which end where a block of every group does, end at blocks of the larger of both.

    Args:
        page_bytes: Bytes of a page.
        token_bytes: Bytes of K and V of one token in one head.
        block_size: The engine's tokens a block.
    """
    most = page_bytes // token_bytes  # tokens of one head
    divisors = [n for n in range(GRANULE, block_size, GRANULE) if block_size % n == 0]
    found = {}
    for tokens in (*divisors, *range(block_size, most + 1, block_size)):
        if heads := most // tokens:
            found[heads] = tokens  # the longest block for so many heads
    yield from found.items()


def held_blocks(
    policy: RetentionPolicy | None,
    num_tokens: int,
    in_flight_tokens: int,
    block_size: int,
) -> int:
    """Most blocks of a request in a group under ``policy``; None keeps everything."""
    if policy is None:
        return cdiv(num_tokens, block_size)
    return policy.max_blocks(in_flight_tokens, num_tokens, block_size)


@dataclass(frozen=True)
class SlotMemory:
    """Memory of one request on a worker whose pool other layers share.

    Args:
        grouping: The worker's groups.
        page_bytes: Bytes of a slot.
        unit_bytes: Bytes of one token in one head (or layer, where none is split).
        counts: Its (retrieval, streaming) heads, a drafter's included; or layers.
        streaming: The streaming heads' policy.
        retrieval: The retrieval heads'; None keeps everything.
        beside: The layers beside, of each kind.
        whole_layers, whole_block: Governed layers, a drafter's included, and tokens of
            a block of theirs under stock attention.
        whole_everywhere: Such layers on all pipeline stages; 0: there is one stage.
    """

    grouping: SlotGrouping
    page_bytes: int
    unit_bytes: int
    counts: tuple[int, int]
    streaming: RetentionPolicy
    retrieval: RetentionPolicy | None
    beside: tuple[LayersBeside, ...]
    whole_layers: int
    whole_block: int
    whole_everywhere: int = 0

    @property
    def pool_block_bytes(self) -> int:
        """Bytes of one block of the pool."""
        num_beside = [layers.num_layers for layers in self.beside]
        return self.grouping.width(num_beside) * self.page_bytes

    @property
    def block_size(self) -> int:
        """Tokens a block of the heads."""
        return self.grouping.tokens_per_block

    @property
    def padding_bytes(self) -> int:
        """Bytes of a slot that no head fills."""
        grouping = self.grouping
        heads = grouping.heads_per_slot * grouping.tokens_per_block * self.unit_bytes
        return self.page_bytes - heads

    def blocks(self, num_tokens: int, in_flight_tokens: int = 1) -> int:
        """Most pool blocks of a request of ``num_tokens``, prompt and answer."""
        request = num_tokens, in_flight_tokens
        return self.grouping.request_blocks(
            held_blocks(self.retrieval, *request, self.block_size),
            held_blocks(self.streaming, *request, self.block_size),
            [layers.blocks(*request) for layers in self.beside],
        )

    def bytes(self, num_tokens: int, in_flight_tokens: int = 1) -> int:
        return self.pool_block_bytes * self.blocks(num_tokens, in_flight_tokens)

    def kept_bytes(self, num_tokens: int) -> int:
        """Bytes of the tokens and states that heads and layers keep, without blocks."""
        tokens = 0
        policies = self.retrieval, self.streaming
        for count, policy in zip(self.counts, policies, strict=True):
            kept = num_tokens if policy is None else min(policy.budget, num_tokens)
            tokens += count * kept
        beside = sum(layers.bytes_kept(num_tokens) for layers in self.beside)
        return tokens * self.unit_bytes + beside

    def dense_bytes(self, num_tokens: int) -> int:
        """Bytes of a request under stock attention, in its own groups."""
        own = [self.whole_layers, *(layers.num_layers for layers in self.beside)]
        everywhere = [self.whole_everywhere or self.whole_layers]
        everywhere += [layers.num_everywhere for layers in self.beside]
        size = vllm_group_size(everywhere)
        groups = [cdiv(count, size) for count in everywhere]
        held = [cdiv(num_tokens, self.whole_block)]
        held += [layers.blocks(num_tokens, 1) for layers in self.beside]
        width = max(map(cdiv, own, groups))
        return self.page_bytes * width * sum(map(int.__mul__, groups, held))
