"""An oracle of the KV cache, token by token: DESIGN 2.1, 2.4 and 2.5 spelt out.

Written from the design's sentences alone and deliberately naive (every formula
is a loop over tokens); it shares no code with ``vllm_sink``. It plays the
worker: it writes each token's key into the slot that the block table names, and
says what a query must be able to read back, what a prefix hit may be, and how
many blocks a request may hold.
"""

from dataclasses import dataclass, field

NULL = 0  # id of vLLM's null block


@dataclass
class Sequence:
    """One request: its tokens and, for each position, a name of its prefix."""

    tokens: list[int]
    names: list[int] = field(default_factory=list)

    def name(self, position: int) -> int:
        """Name of ``tokens[: position + 1]``; what a cached key depends on."""
        while len(self.names) <= position:
            before = self.names[-1] if self.names else 0
            self.names.append(hash((before, self.tokens[len(self.names)])))
        return self.names[position]

    def replace_from(self, position: int, tokens: list[int]) -> None:
        """Drop what follows ``position`` (rejected drafts) and append tokens."""
        del self.tokens[position:], self.names[position:]
        self.tokens.extend(tokens)


@dataclass
class Oracle:
    """Contents of every slot of the pool, under (S, W) and block size B."""

    num_sinks: int
    window: int
    block_size: int
    slots: dict[int, list[int | None]] = field(default_factory=dict)

    def sees(self, query: int, key: int) -> bool:
        """2.1: the mask."""
        return key <= query and (key < self.num_sinks or query - key < self.window)

    def blocks(self, tokens: int) -> int:
        """Blocks that ``tokens`` tokens fill or start."""
        return -(-tokens // self.block_size)

    def tokens_of(self, index: int) -> range:
        return range(index * self.block_size, (index + 1) * self.block_size)

    def in_gap(self, index: int, query: int) -> bool:
        """2.4: all of the block's tokens have left the window and are no sinks."""
        return all(
            key < query and not self.sees(query, key) for key in self.tokens_of(index)
        )

    def must_hold(self, processed: int, required: int) -> list[int]:
        """Indices that a request holds: ``required`` tokens less the gap."""
        return [
            i for i in range(self.blocks(required)) if not self.in_gap(i, processed)
        ]

    def bound(self, in_flight: int) -> int:
        """2.4: most live blocks of a request."""
        windowed = self.blocks(self.window - 1 + in_flight)
        return self.blocks(self.num_sinks) + windowed + 1

    def write(self, row: list[int], start: int, end: int, sequence: Sequence) -> None:
        """The worker's step: keys of ``start .. end-1`` go into their slots."""
        for position in range(start, end):
            index, offset = divmod(position, self.block_size)
            assert row[index] != NULL, f"position {position} has no slot"
            if offset == 0 or row[index] not in self.slots:
                self.slots[row[index]] = [None] * self.block_size
            self.slots[row[index]][offset] = sequence.name(position)

    def check_visible(self, row: list[int], query: int, sequence: Sequence) -> None:
        """Every key that the query sees, itself excepted, is where it was put."""
        for key in range(query):
            if self.sees(query, key):
                index, offset = divmod(key, self.block_size)
                assert row[index] != NULL, f"key {key} of query {query} was freed"
                found = self.slots[row[index]][offset]
                assert found == sequence.name(key), f"key {key} was overwritten"

    def prefix_of(self, block_id: int) -> int | None:
        """Name of the prefix that a full block ends; None if it isn't full."""
        slots = self.slots.get(block_id)
        return None if slots is None or None in slots else slots[-1]

    def cached_prefixes(self, cached_ids: set[int]) -> set[int]:
        """Names of the prefixes whose last block is in the prefix cache."""
        names = set()
        for block_id in cached_ids:
            name = self.prefix_of(block_id)
            assert name is not None, "a block that isn't full is in the prefix cache"
            names.add(name)
        return names

    def is_hit(self, sequence: Sequence, n: int, cached: set[int]) -> bool:
        """2.5: the sinks and ``[n-W+1, n)`` of so many whole blocks are cached."""
        size = self.block_size
        return all(
            sequence.name((index + 1) * size - 1) in cached
            for index in range(n // size)
            if any(self.sees(n, key) for key in self.tokens_of(index))
        )

    def longest_hit(self, sequence: Sequence, limit: int, cached: set[int]) -> int:
        """2.5: most tokens of whole blocks, at most ``limit``, that are a hit."""
        for count in range(limit // self.block_size, 0, -1):
            if self.is_hit(sequence, count * self.block_size, cached):
                return count * self.block_size
        return 0

    def serves_retry(self, index: int, resumed_at: int, num_prompt: int) -> bool:
        """2.5: the same prompt, or its part before the last message, would hit it."""
        size = self.block_size
        return any(
            index < n // size
            and any(self.sees(n // size * size, key) for key in self.tokens_of(index))
            for n in (resumed_at, num_prompt - 1)
        )

    def serves_a_hit(self, index: int) -> bool:
        """2.5: whether some hit needs the block (with W = 1 only sinks do)."""
        n = (index + 1) * self.block_size
        return any(self.sees(n, key) for key in self.tokens_of(index))

    def check_hit(self, row: list[int], n: int, sequence: Sequence) -> None:
        """The hit's blocks are the right ones and the gap is missing."""
        assert len(row) * self.block_size == n
        for index, block_id in enumerate(row):
            if self.in_gap(index, n):
                assert block_id == NULL, "a hit must not hold the gap"
        self.check_visible(row, n, sequence)


@dataclass
class Worth:
    """2.5: which cached blocks may be reused before which others.

    Knows what it is sure of: blocks that one request alone ever held.
    """

    kinds: dict[int, str] = field(default_factory=dict)  # of free blocks
    ages: dict[int, int] = field(default_factory=dict)  # of tails: when they were freed
    rounds: dict[int, int] = field(default_factory=dict)  # that they are spared
    shared: set[int] = field(default_factory=set)
    clock: int = 0

    def take_up(self, ids: set[int]) -> None:
        """A hit: now two requests have held them."""
        self.shared |= ids
        for block_id in ids:
            self.kinds.pop(block_id, None)

    def free(self, block_id: int, kind: str, rounds: int = 0) -> None:
        self.clock += 1
        if block_id not in self.shared:
            self.kinds[block_id] = kind
            self.ages[block_id] = self.clock
            self.rounds[block_id] = rounds

    def forget(self, ids: set[int]) -> None:
        """They are somebody's again, with other contents."""
        self.shared -= ids
        for block_id in ids:
            self.kinds.pop(block_id, None)

    def check(self, taken: set[int], free: set[int], blank: set[int]) -> None:
        """What was taken is worth no more than what is left.

        Args:
            taken: Cached blocks that were reused.
            free, blank: What is free now, and of it what isn't cached.
        """
        if not taken:
            return
        assert not blank, "a cached block was reused, a blank one was free"
        of = self.kinds.get
        kept = [i for i in free if of(i) in ("gap", "tail")]
        if any(of(i) in ("tail", "retry") for i in taken):
            assert not any(of(i) == "gap" for i in kept), "a tail went before a gap"
        for i in taken:
            if of(i) == "tail":
                assert not any(
                    self.ages[other] < self.ages[i]
                    and self.rounds[other] <= self.rounds[i]
                    for other in kept
                    if of(other) == "tail"
                ), "a younger tail went first, of no shorter history"
