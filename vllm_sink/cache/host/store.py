"""Which blocks lie in which slots of host memory, and which turn goes first.

A *turn* is what one request wants to find again: its sinks and its windows. Turns
share blocks (chats of one system prompt, the turns of a chat), so a block stays while
any turn has it. Turns leave as a whole, the one that was used longest ago first: half
a window serves nobody, and no tail outlives its sinks.

The store lives and dies with one engine, whose policy, heads and positions are one:
its keys need none of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

Key = Hashable  # what names a block's content, and its group of layers


@dataclass(eq=False)
class Entry:
    """A block in host memory.

    Args:
        key: What it holds.
        slot: Where.
        serial: Number of the copy that filled the slot. The worker compares it, so
            that no slot is read which holds something else.
        holders: Turns that have it, and loads under way.
    """

    key: Key
    slot: int
    serial: int
    holders: int = 0
    is_null: bool = False  # as vLLM asks of a block


@dataclass(eq=False)
class Turn:
    """What one request wants to find again.

    Args:
        entries: By key.
        end: Key of the last block that a hit needs; None before there is one.
    """

    entries: dict[Key, Entry] = field(default_factory=dict)
    end: Key | None = None


class HostStore:
    """The account of ``num_slots`` slots; see the module."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.entries: dict[Key, Entry] = {}
        self.turns: OrderedDict[str, Turn] = OrderedDict()  # the next to go first
        self._ends: dict[Key, str] = {}
        self._free = list(range(num_slots - 1, -1, -1))
        self._last_serial = 0

    @property
    def num_used(self) -> int:
        return self.num_slots - len(self._free)

    def get(self, key: Key) -> Entry | None:
        return self.entries.get(key)

    def open_turn(self, name: str) -> Turn:
        """The turn of this name, as the one that was used last."""
        turn = self.turns.setdefault(name, Turn())
        self.turns.move_to_end(name)
        return turn

    def add(self, name: str, key: Key) -> Entry | None:
        """Give a turn a block that it has not.

        Other turns make way for a block that is new to the host, and its content must
        be copied to its slot. None where even that gives no slot.
        """
        turn = self.turns[name]
        assert key not in turn.entries, "a turn has a block once"
        entry = self.entries.get(key)
        if entry is None:
            if not self._make_way(name):
                return None
            self._last_serial += 1
            entry = Entry(key, self._free.pop(), self._last_serial)
            self.entries[key] = entry
        entry.holders += 1
        turn.entries[key] = entry
        return entry

    def _make_way(self, name: str) -> bool:
        """Whether there is a free slot, once other turns have left."""
        while not self._free:
            oldest = next((other for other in self.turns if other != name), None)
            if oldest is None:
                return False
            self.drop_turn(oldest)
        return True

    def remove(self, name: str, keys: Iterable[Key]) -> None:
        """Take blocks from a turn."""
        turn = self.turns[name]
        for key in keys:
            self.release(turn.entries.pop(key))

    def drop_turn(self, name: str) -> None:
        if (turn := self.turns.pop(name, None)) is None:
            return
        if self._ends.get(turn.end) == name:
            del self._ends[turn.end]
        for entry in turn.entries.values():
            self.release(entry)

    def set_end(self, name: str, key: Key) -> None:
        """The turn can be found again up to this block."""
        turn = self.turns[name]
        if self._ends.get(turn.end) == name:
            del self._ends[turn.end]
        turn.end = key
        self._ends[key] = name

    def demote_earlier(self, keys: Iterable[Key]) -> None:
        """Turns that end at one of these blocks go before all others.

        Args:
            keys: Of a later turn's row, last blocks first.
        """
        for key in keys:
            if (other := self._ends.get(key)) is not None:
                self.turns.move_to_end(other, last=False)

    def hold(self, entry: Entry) -> None:
        """Keep a block's slot until :meth:`release`."""
        entry.holders += 1

    def release(self, entry: Entry) -> None:
        entry.holders -= 1
        if entry.holders == 0:
            self._free.append(entry.slot)
            if self.entries.get(entry.key) is entry:
                del self.entries[entry.key]

    def forget(self, entries: Iterable[Entry]) -> None:
        """Find these blocks no more: what they hold isn't certain."""
        for entry in entries:
            if self.entries.get(entry.key) is entry:
                del self.entries[entry.key]
            for turn in self.turns.values():
                if turn.entries.get(entry.key) is entry:
                    del turn.entries[entry.key]
                    self.release(entry)

    def clear(self) -> None:
        """Find nothing any more; slots that loads read are free once they end."""
        self.entries.clear()
        for name in list(self.turns):
            self.drop_turn(name)
