"""Which free blocks are reused first: those of least worth.

vLLM keeps a freed block's contents until its pool hands the block out again, in the
order of its free queue, the least recently freed first. Under the policy a long
request frees its gap all the time, which in that order would push out the ends of all
idle chats. So just before blocks are taken, those of least worth go to the front::

    blank | gap | tails of turns, by age | what several requests share
          `------- cached, and free to be reused -------'

- *blank*: never used, or without a hash. vLLM keeps them in front itself.
- *gap*: behind a running request's window; serves another prompt by luck. The last
  of a row goes first, since prompts share their starts.
- *tails*: all else, in vLLM's own order. A turn's blocks are freed last block first, so
  behind a tail stand the sinks without which it is useless: no orphan tails. To a tail
  belong its *retries*: the part of the gap that the same prompt, sent anew or with
  another last message, would hit. Once the chat goes on they are gap.
- *long*: a tail saves its whole history, and takes a window of it. One that saves 2, 4,
  8 … times what it takes goes to the queue's end 1, 2, 3 … times when its time has
  come: a *round* each. This is GreedyDual (Young, The k-server dual and loose
  competitiveness for paging, 1994), which evicts by cost and size beside age, in
  powers of two.
- *shared*: a block that requests took up in the midst of another's row gets one more
  round for each.

A round is paid by the hit or the end that gave it, so the work is O(1) a block that is
freed, hit or taken. Rounds end, so what nobody shares or wants any more ages like the
rest.

Only public methods of vLLM's queue are used. What others take or free follows vLLM's
own order and need not be told here: an entry counts only while its block is free with
the hash that it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar
from weakref import WeakValueDictionary

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock

Cached = tuple[int, BlockHashWithGroupId]  # a block's id and the hash that it had
Counts = dict[int, tuple[BlockHashWithGroupId, int]]  # by block id
MOST_ROUNDS = 3  # of a shared block, however often it is hit
MOST_SPARED = 4096  # blocks sent round at once: some milliseconds of a step


class FreeOrder:
    """The order of one pool's free blocks, whichever group of layers they are of.

    Every table is by block id and holds the hash that the block had.

    Attributes:
        gap: In the order in which they left a window.
        ends: Where a chat stopped, and the retries that are gap when it goes on.
        rounds: How often a block is still spared because it is shared.
        long: How often because of the history behind it.
        weighs_tails: Whether tails of long histories are spared. The start says so
            where the pool has one group of layers: elsewhere a chat's blocks of
            other groups, which its next hit needs as well, would go by age.
    """

    # id of a pool -> its order, which the managers of the pool's groups hold.
    _orders: ClassVar[WeakValueDictionary[int, FreeOrder]] = WeakValueDictionary()

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.gap: dict[int, BlockHashWithGroupId] = {}
        self.ends: dict[int, tuple[BlockHashWithGroupId, list[Cached]]] = {}
        self.rounds: Counts = {}
        self.long: Counts = {}
        self.weighs_tails = False

    @classmethod
    def of(cls, pool: BlockPool) -> FreeOrder:
        """The pool's: the managers of its groups hold one together."""
        order = cls._orders.get(id(pool))
        if order is None:
            order = cls._orders[id(pool)] = cls(pool)
        return order

    def add_gap(self, block: KVCacheBlock) -> None:
        """A block is nobody's window any more; somebody may hold it still."""
        if not block.ref_cnt and block.block_hash and not self.rounds_of(block):
            self.gap[block.block_id] = block.block_hash

    def end_at(self, block: KVCacheBlock, retries: list[Cached]) -> None:
        """A chat stops behind this block, with a prompt's end or an answer's."""
        if block.block_hash is not None:
            self.ends[block.block_id] = block.block_hash, retries

    def leave(self, row: Sequence[KVCacheBlock]) -> None:
        """A request is about to free its row, which may have a null gap."""
        if not self.weighs_tails:
            return
        held = [block for block in row if not block.is_null]
        times = len(row) // max(len(held), 1)  # what a hit saves, of what it takes
        if (count := times.bit_length() - 1) < 1:
            return
        for block in held:
            if block.block_hash is not None:
                count_now = max(count, _count_of(self.long, block))
                self.long[block.block_id] = block.block_hash, count_now

    def take_up(self, hit: Sequence[KVCacheBlock]) -> None:
        """A request is about to hold the cached blocks of a hit.

        One that ends where a chat stopped goes on with it. Any other parts from a
        request that went on with other tokens: what both need is shared.
        """
        if not hit:
            return
        block_hash, retries = self.ends.get(hit[-1].block_id, (None, []))
        is_shared = block_hash != hit[-1].block_hash
        for block in hit:
            self.gap.pop(block.block_id, None)
            if is_shared:
                assert block.block_hash is not None, "a hit's blocks are cached"
                count = min(self.rounds_of(block) + 1, MOST_ROUNDS)
                self.rounds[block.block_id] = block.block_hash, count
        if not is_shared:
            self.ends[hit[-1].block_id] = hit[-1].block_hash, []
            held = {block.block_id for block in hit}
            for block_id, block_hash in reversed(retries):
                block = self.pool.blocks[block_id]
                if block_id not in held and block.block_hash == block_hash:
                    self.add_gap(block)

    def rounds_of(self, block: KVCacheBlock) -> int:
        """How often a shared block is still spared."""
        return _count_of(self.rounds, block)

    def make_way(self, count: int) -> None:
        """Put the ``count`` free blocks of least worth in front of the queue."""
        queue = self.pool.free_block_queue
        if count > queue.num_free_blocks:
            return  # vLLM says so itself
        last_blank = None
        for block in queue.iter_blocks_after(None):
            if count == 0 or block.block_hash is not None:
                break
            last_blank = block
            count -= 1
        chosen = self._choose(count)
        for block in chosen:
            queue.remove(block)
        chosen += self._spare(last_blank, count - len(chosen))
        queue.prepend_n(chosen)

    def forget(self, taken: Sequence[KVCacheBlock]) -> None:
        """These blocks hold something else from now on; the tables stay small."""
        for block in taken:
            # By chance they may come to hold the same again, as something else.
            for table in (self.gap, self.ends, self.rounds, self.long):
                table.pop(block.block_id, None)

    def _choose(self, count: int) -> list[KVCacheBlock]:
        """At most ``count`` blocks of gaps, those of least worth first."""
        chosen: list[KVCacheBlock] = []
        while len(chosen) < count and self.gap:
            block_id, block_hash = self.gap.popitem()  # the latest
            block = self.pool.blocks[block_id]
            if block.ref_cnt == 0 and block.block_hash == block_hash:
                chosen.append(block)
        return chosen

    def _spare(self, cursor: KVCacheBlock | None, count: int) -> list[KVCacheBlock]:
        """Send blocks round until ``count`` others follow ``cursor``.

        Returns:
            Blocks that are no longer in the queue and go all the same, instead of
            others: too many were spared, and these stood in front of them.
        """
        queue = self.pool.free_block_queue
        spared: list[KVCacheBlock] = []
        while count:
            if len(spared) >= MOST_SPARED:
                for block in spared[:count]:
                    queue.remove(block)
                return spared[:count]
            block = next(queue.iter_blocks_after(cursor))
            if not self._takes_round(block):
                cursor = block
                count -= 1
                continue
            queue.remove(block)
            queue.append(block)
            spared.append(block)
        return []

    def _takes_round(self, block: KVCacheBlock) -> bool:
        for table in (self.rounds, self.long):
            if count := _count_of(table, block):
                assert block.block_hash is not None
                table[block.block_id] = block.block_hash, count - 1
                return True
        return False


def _count_of(table: Counts, block: KVCacheBlock) -> int:
    """What a table holds of a block, if it still is the one that is meant."""
    block_hash, count = table.get(block.block_id, (None, 0))
    return count if block_hash == block.block_hash else 0
