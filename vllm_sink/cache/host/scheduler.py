"""The scheduler's half: what is copied to host memory, and what comes back.

**To the host.** When a request's tokens fill a block, and its prompt is behind it, what
a hit at that point needs is copied: sinks and window of the layers under the policy,
the window of layers with their own, everything of retrieval heads; never the gap. What
the request's prompt needs stays beside it (chat templates often change how an answer
is repeated), what lies between is given up again::

    position   0 .. S-1 | gap | window of the prompt | given up | window | now
               kept       -     kept                   -          kept

Each block is copied once, in the step that computes its last token, so nothing is left
to do when a request ends or is preempted, but where a token's value is known late
(:meth:`HostScheduler.end_request`).

**From the host.** What :class:`.Lookup` matches is loaded whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id
from vllm.v1.request import Request

from vllm_sink.cache.host.lookup import Lookup, Place
from vllm_sink.cache.host.store import Entry, HostStore, Key
from vllm_sink.cache.metrics import metrics

LoadCopy = tuple[int, int, int]  # slot, serial, block of the pool
SaveCopy = tuple[int, int, int]  # block of the pool, slot, serial


@dataclass
class Copies:
    """One step's work of every worker.

    Args:
        loads: By request, copies from the host.
        saves: Copies to the host, made once the step's tokens are computed.
        ended: Requests whose blocks are free after the saves.
    """

    loads: dict[str, list[LoadCopy]] = field(default_factory=dict)
    saves: list[SaveCopy] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Place:
    """A block of a request: its group, its index in the row, its content."""

    group: int
    index: int
    block_hash: BlockHash

    @property
    def key(self) -> Key:
        return make_block_hash_with_group_id(self.block_hash, self.group)


@dataclass
class _Progress:
    """A request that vLLM knows.

    Args:
        request: vLLM's own.
        saved: Tokens up to which its blocks were looked at.
        windowed: What its turn has of layers with a window.
        kept: What of these its prompt needs.
    """

    request: Request
    saved: int = 0
    windowed: set[Key] = field(default_factory=set)
    kept: frozenset[Key] = frozenset()


@dataclass
class _Match:
    """What the host has for a request behind its hit in the pool.

    Args:
        num_tokens: Tokens behind it.
        places: Where each block to load goes.
    """

    num_tokens: int
    places: list[Place]


class HostScheduler:
    """See the module.

    Args:
        num_slots: Blocks that the host holds.
        slot_bytes: Bytes of one, on all workers together.
    """

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        self.store = HostStore(num_slots)
        self.slot_bytes = slot_bytes
        self.metrics = metrics()
        self._num_used = 0
        self._requests: dict[str, _Progress] = {}
        self._matches: dict[str, _Match] = {}
        self._loading: dict[str, tuple[int, list[Entry]]] = {}
        self._barred: set[str] = set()  # a load of theirs failed
        self._next = Copies()
        self._ending: list[tuple[_Progress, int]] = []  # and tokens computed

    def bind(self, manager: KVCacheManager) -> None:
        """The engine's block manager; once, before any request."""
        self.manager = manager
        self.pool = manager.block_pool
        self._cached = self.pool.cached_block_hash_to_block
        self.lookup = Lookup(manager, self.store)

    # -- from the host --------------------------------------------------------

    def match(self, request: Request, num_hit_tokens: int) -> int:
        """Tokens that the host has behind the pool's hit."""
        self._matches.pop(request.request_id, None)
        self._follow_reset()
        if (
            request.skip_reading_prefix_cache
            or request.request_id in self._barred
            or not self.store.entries
        ):
            return 0
        num_tokens, places = self.lookup.find(request, num_hit_tokens)
        if num_tokens:
            self._matches[request.request_id] = _Match(num_tokens, places)
        return num_tokens

    def start_load(
        self, request: Request, blocks: KVCacheBlocks, num_tokens: int
    ) -> None:
        """vLLM has allocated blocks for tokens that :meth:`match` found."""
        match = self._matches.pop(request.request_id, None)
        if not num_tokens:
            return
        entries: list[Entry] = []
        copies: list[LoadCopy] = [(-1, -1, 0)]  # fails
        if match is not None and match.num_tokens == num_tokens:
            copies = []
            for group, index, entry in match.places:
                block = blocks.blocks[group][index]
                assert not block.is_null, "what a hit needs is not in the gap"
                copies.append((entry.slot, entry.serial, block.block_id))
                self.store.hold(entry)
                entries.append(entry)
        # else vLLM cut the match short: a part of a window is none.
        self._loading[request.request_id] = num_tokens, entries
        self._next.loads[request.request_id] = copies

    def end_loads(self, ended: Iterable[str], failed: Iterable[str]) -> None:
        """Loads that every worker has ended; vLLM computes the failed ones anew."""
        failed = set(failed)
        for name in ended:
            num_tokens, entries = self._loading.pop(name)
            if name in failed:
                self._barred.add(name)
                self.store.forget(entries)
            else:
                self._count("hits", 1)
                self._count("hit_tokens", num_tokens)
                self._count("loaded_blocks", len(entries))
                self._count("loaded_bytes", len(entries) * self.slot_bytes)
            for entry in entries:
                self.store.release(entry)
        self._count_used()

    # -- to the host ----------------------------------------------------------

    def add_request(self, request: Request) -> None:
        self._requests[request.request_id] = _Progress(request)

    def take_copies(self, num_scheduled_tokens: dict[str, int]) -> Copies:
        """The work of the step that computes so many tokens of each request."""
        self._follow_reset()
        copies, self._next = self._next, Copies()
        for name, count in num_scheduled_tokens.items():
            progress = self._requests[name]
            computed = progress.request.num_computed_tokens + count
            copies.saves += self._save(progress, computed)
        for progress, done in self._ending:
            copies.saves += self._save(progress, done)
            copies.ended.add(progress.request.request_id)
        self._ending.clear()
        # A turn may have left in this very step, and its slot be another's by now.
        copies.saves = list(
            {slot: (b, slot, s) for b, slot, s in copies.saves}.values()
        )
        self._count_used()
        return copies

    def end_request(self, request: Request) -> bool:
        """Whether the request's blocks must stay until the next step's copies.

        Rarely: where tokens are scheduled ahead of their values, the last block may
        get its name only as the request ends.
        """
        name = request.request_id
        progress = self._requests.pop(name)
        self._matches.pop(name, None)
        self._barred.discard(name)
        if name in self._loading:  # aborted: its blocks hold nothing yet
            return False
        done = request.num_computed_tokens - request.num_in_flight_tokens
        is_late = self._new_end(progress, done) > 0
        if is_late:  # nobody may find it before it is copied
            self._ending.append((progress, done))
        return is_late

    def _new_end(self, progress: _Progress, num_computed_tokens: int) -> int:
        """Tokens of full blocks of which some were not looked at; 0 without."""
        request = progress.request
        if num_computed_tokens < request.num_tokens - 1:
            return 0  # a prompt in chunks, or what a preemption lost
        if num_computed_tokens < progress.saved:
            progress.saved = 0
        known = len(request.block_hashes) * self.pool.hash_block_size
        unit = self.lookup.alignment
        end = min(known, num_computed_tokens) // unit * unit
        return end if end > progress.saved else 0

    def _save(self, progress: _Progress, num_computed_tokens: int) -> list[SaveCopy]:
        """Copies that make a request's last full blocks a hit."""
        end = self._new_end(progress, num_computed_tokens)
        if not end:
            return []
        request = progress.request
        is_first = not progress.saved or request.request_id not in self.store.turns
        start = 0 if is_first else progress.saved
        progress.saved = end
        places = list(self._needed(request, start, end))
        windowed = {place.key for place in places if self.lookup.groups[place.group][1]}
        if is_first:
            progress.kept = frozenset(windowed)
            self._demote_earlier_turns(request, end)
        return self._keep(progress, places, windowed)

    def _keep(
        self, progress: _Progress, places: list[_Place], windowed: set[Key]
    ) -> list[SaveCopy]:
        """Give a request's turn these blocks, and take what its window has left."""
        name = progress.request.request_id
        turn = self.store.open_turn(name)
        left = progress.windowed - windowed - progress.kept
        self.store.remove(name, left & turn.entries.keys())
        missing = [place for place in places if place.key not in turn.entries]
        found = [place for place in missing if self.store.get(place.key)]
        sources = [
            (place.key, block)
            for place in missing
            if not self.store.get(place.key) and (block := self._find(name, place))
        ]
        copies: list[SaveCopy] = []
        fits = len(turn.entries) + len(missing) <= self.store.num_slots
        if fits:
            for place in found:
                self.store.add(name, place.key)
            for key, block in sources:
                entry = self.store.add(name, key)
                if entry is None:
                    fits = False  # loads hold the rest
                    break
                copies.append((block, entry.slot, entry.serial))
        if not fits:  # a part would serve nobody
            self.store.drop_turn(name)
            progress.windowed = set()
            return []
        progress.windowed = (windowed | progress.kept) & turn.entries.keys()
        self.store.set_end(name, places[-1].key)
        self._count("stored_blocks", len(copies))
        self._count("stored_bytes", len(copies) * self.slot_bytes)
        return copies

    def _needed(self, request: Request, start: int, end: int) -> Iterator[_Place]:
        """Blocks that hits of ``end`` tokens, and of one block less, need.

        One less: the last token of a prompt that is sent anew is computed anew, and
        a drafter drops the last block of a hit. The last one is the end's.

        Args:
            start: Up to where the groups that need everything have it.
        """
        before = max(end - self.lookup.alignment, 0)
        for group, (size, policy) in reversed(list(enumerate(self.lookup.groups))):
            hashes = self.lookup.hashes(request, size)
            if policy is None:
                indices = [*range(start // size, end // size)]
            else:
                first, last = policy.gap_blocks(before, size)
                indices = [
                    *range(min(first, end // size)),
                    *range(last, end // size),
                ]
            for index in indices:
                yield _Place(group, index, hashes[index])

    def _find(self, name: str, place: _Place) -> int | None:
        """The pool's block at a place: the request's own, or one that is free.

        Its own may have left the window since the last full block. A free one that
        has the content's name holds it: whoever computed it is done.
        """
        row = self.manager.get_blocks(name).blocks[place.group]
        if place.index < len(row) and not row[place.index].is_null:
            return row[place.index].block_id
        cached = self.pool.get_cached_block(place.block_hash, [place.group])
        if cached is not None and cached[0].ref_cnt == 0:
            return cached[0].block_id
        return None

    def _demote_earlier_turns(self, request: Request, end: int) -> None:
        """Earlier turns of the chat serve only those who go back to them."""
        size, _ = self.lookup.groups[0]
        hashes = self.lookup.hashes(request, size)
        self.store.demote_earlier(
            _Place(0, index, hashes[index]).key
            for index in range(end // size - 1, -1, -1)
        )

    # -- account --------------------------------------------------------------

    def reset(self) -> None:
        """Find nothing any more: the model's weights have changed, say."""
        self.store.clear()
        for progress in self._requests.values():
            progress.saved = 0
            progress.windowed = set()
        self._count_used()

    def _follow_reset(self) -> None:
        """What resets the pool's prefix cache resets the host's."""
        cached = self.pool.cached_block_hash_to_block
        if cached is not self._cached:
            self._cached = cached
            self.reset()

    def _count(self, name: str, amount: int) -> None:
        if self.metrics and amount:
            self.metrics.add(f"vllm:sink_host_{name}", amount)

    def _count_used(self) -> None:
        self._count("blocks", self.store.num_used - self._num_used)
        self._num_used = self.store.num_used
