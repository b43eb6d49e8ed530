"""What the host has for a request behind its hit in the pool.

The lookup is vLLM's own, by the same code and settings as in the pool, over what the
pool's hit has and what the host has behind it. So it is a match only where sinks and
window are all there.
"""

from __future__ import annotations

import copy
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    make_block_hash_with_group_id,
    resolve_block_hashes,
)
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec
from vllm.v1.request import Request

from vllm_sink.cache.host.store import Entry, HostStore
from vllm_sink.cache.spec import SinkSpec
from vllm_sink.policy.layout import RetentionPolicy

Place = tuple[int, int, Entry]  # group, index in the row, what goes there


def policy_of(spec: KVCacheSpec) -> RetentionPolicy | None:
    """What a hit needs of a group's layers; None needs everything."""
    if isinstance(spec, SinkSpec):
        return spec.policy
    if isinstance(spec, SlidingWindowSpec):
        return RetentionPolicy(0, spec.sliding_window + spec.extra_retained_tokens)
    return None


class _PoolAndHost:
    """Looks like a pool to vLLM's lookup: the pool's hit, and the host's blocks."""

    def __init__(self, pool: Any, store: HostStore) -> None:
        self.hash_block_size = pool.hash_block_size
        self.null_block = pool.null_block
        self.store = store
        self.hit: frozenset[BlockHash] = frozenset()  # of blocks that it covers
        self._of_pool = Entry(None, -1, -1)

    def get_cached_block(
        self, block_hash: BlockHash, kv_cache_group_ids: list[int]
    ) -> list[Entry] | None:
        if block_hash in self.hit:
            return [self._of_pool] * len(kv_cache_group_ids)
        found = []
        for group in kv_cache_group_ids:
            entry = self.store.get(make_block_hash_with_group_id(block_hash, group))
            if entry is None:
                return None
            found.append(entry)
        return found


class Lookup:
    """See the module.

    Attributes:
        groups: Of each group of layers, its block size and what a hit needs of it.
        alignment: Tokens of which a hit is a multiple.
    """

    def __init__(self, manager: KVCacheManager, store: HostStore) -> None:
        coordinator = manager.coordinator
        self.alignment = coordinator.scheduler_block_size
        self._view = _PoolAndHost(manager.block_pool, store)
        # The same lookup, asked about other blocks: nothing else of it is used.
        managers = [copy.copy(each) for each in coordinator.single_type_managers]
        for each in managers:
            each.block_pool = self._view  # type: ignore[assignment]
        self._coordinator = copy.copy(coordinator)
        self._coordinator.block_pool = self._view  # type: ignore[assignment]
        self._coordinator.single_type_managers = tuple(managers)
        self.groups = [
            (each.block_size, policy_of(each.kv_cache_spec)) for each in managers
        ]

    def hashes(self, request: Request, size: int) -> Any:
        """Names of the contents of the request's blocks of ``size`` tokens."""
        return resolve_block_hashes(
            request.block_hashes, self._view.hash_block_size, size
        )

    def find(self, request: Request, num_hit_tokens: int) -> tuple[int, list[Place]]:
        """Tokens behind the pool's hit, and the host's blocks that they need."""
        self._view.hit = frozenset(
            block_hash
            for size in {size for size, _ in self.groups}
            for block_hash in self.hashes(request, size)[: num_hit_tokens // size]
        )
        found, end, _ = self._coordinator.find_longest_cache_hit(
            request.block_hashes, request.num_tokens - 1
        )
        if end <= num_hit_tokens or end % self.alignment:
            return 0, []
        places: list[Any] = [
            (group, index, entry)
            for group, (size, _) in enumerate(self.groups)
            for index, entry in enumerate(found[group])
            if index >= num_hit_tokens // size and not entry.is_null
        ]
        return end - num_hit_tokens, places
