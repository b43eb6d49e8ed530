"""vLLM's real KVCacheManager with the sink spec, against a token-level oracle."""

import random

import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from vllm_sink import compat
from vllm_sink.kv_cache_spec import SinkSpec
from vllm_sink.layout import RetentionPolicy, cdiv

CHUNK = 24
MAX_LEN = 400


def make_manager(policy: RetentionPolicy, size: int, num_blocks: int):
    compat.register_kv_cache_spec()
    spec = SinkSpec(
        block_size=size,
        num_kv_heads=1,
        head_size=16,
        dtype=torch.float32,
        sliding_window=policy.window_size,
        num_sink_tokens=policy.num_sink_tokens,
    )
    return KVCacheManager(
        KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        max_model_len=MAX_LEN,
        scheduler_block_size=size,
        hash_block_size=size,
        max_in_flight_tokens=CHUNK,
    )


def test_gap_is_what_no_later_query_sees():
    for sinks, window, size in [(0, 1, 1), (4, 60, 16), (5, 7, 3), (130, 126, 32)]:
        policy = RetentionPolicy(sinks, window)
        for n in range(0, 600, 7):
            first, last = policy.gap_blocks(n, size)
            unseen = [
                block
                for block in range(cdiv(n, size))
                if not any(
                    policy.sees(n, token)
                    for token in range(block * size, min((block + 1) * size, n + 1))
                )
            ]
            assert list(range(first, last)) == unseen


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sinks, window, size", [(4, 60, 16), (0, 33, 16), (20, 1, 8)])
def test_random_life_against_the_oracle(sinks, window, size, seed):
    """Add, hit, extend, preempt, abort and finish under pressure.

    The oracle knows what each physical block holds (request-independent: the
    token prefix that produced it), so a hit that returned the wrong block, a
    sink block reused under a live request or a leak shows at once.
    """
    policy = RetentionPolicy(sinks, window)
    bound = policy.max_blocks(CHUNK, MAX_LEN, size)
    manager = make_manager(policy, size, num_blocks=3 * bound + 1)
    pool = manager.block_pool
    free_at_start = pool.get_num_free_blocks()
    init_none_hash(sha256)
    hasher = get_request_block_hasher(size, sha256)
    rng = random.Random(seed)
    roots = [[rng.randrange(50) for _ in range(MAX_LEN)] for _ in range(3)]
    contents: dict[int, tuple[int, ...]] = {}  # block id -> the prefix it ends
    running: dict[str, Request] = {}
    hits = 0

    def row(request):
        blocks = manager.coordinator.get_blocks(request.request_id)
        return blocks[0]

    def check() -> None:
        held: dict[int, int] = {}
        for request in running.values():
            blocks = row(request)
            live = [block for block in blocks if not block.is_null]
            assert len(live) <= bound
            for block in live:
                held[block.block_id] = held.get(block.block_id, 0) + 1
            n = request.num_computed_tokens
            for index, block in enumerate(blocks):
                tokens = range(index * size, min((index + 1) * size, n))
                if any(policy.sees(n, token) for token in tokens):
                    assert not block.is_null, "a visible block was freed"
                    end = min((index + 1) * size, n)
                    prefix = tuple(request.all_token_ids[:end])
                    assert contents[block.block_id][:end] == prefix
        for block in pool.blocks[1:]:
            assert block.ref_cnt == held.get(block.block_id, 0)
        assert pool.get_num_free_blocks() == free_at_start - len(held)

    def advance(request, count, **kwargs) -> bool:
        allocated = manager.allocate_slots(request, count, **kwargs)
        if allocated is None:
            return False
        request.num_computed_tokens += kwargs.get("num_new_computed_tokens", 0)
        start = request.num_computed_tokens
        request.num_computed_tokens += count
        blocks = row(request)
        for index in range(start // size, cdiv(start + count, size)):
            end = min((index + 1) * size, start + count)
            contents[blocks[index].block_id] = tuple(request.all_token_ids[:end])
        return True

    for step in range(300):
        action = rng.random()
        if action < 0.25 and len(running) < 6:
            root = rng.choice(roots)
            cut, length = rng.randrange(1, 300), rng.randrange(1, 300)
            tokens = root[:cut] + [rng.randrange(50) for _ in range(8)]
            tokens = tokens[:length] or [1]
            request = Request(
                str(step),
                tokens,
                SamplingParams(max_tokens=9),
                None,
                block_hasher=hasher,
            )
            computed, num_computed, _ = manager.get_computed_blocks(request)
            hits += num_computed > 0
            todo = min(CHUNK, len(tokens) - num_computed)
            if advance(
                request,
                todo,
                num_new_computed_tokens=num_computed,
                new_computed_blocks=computed,
                full_sequence_must_fit=True,
            ):
                running[request.request_id] = request
        elif running:
            request = rng.choice(list(running.values()))
            left = request.num_tokens - request.num_computed_tokens
            if action < 0.85 and request.num_tokens < MAX_LEN - 1:
                if left == 0:
                    request.append_output_token_ids(rng.randrange(50))
                    left = 1
                if not advance(request, min(CHUNK, left)):
                    manager.free(request)
                    del running[request.request_id]
            else:
                manager.free(request)
                del running[request.request_id]
        check()
    for request in running.values():
        manager.free(request)
    assert hits > 5, "the run must exercise prefix hits"
    assert pool.get_num_free_blocks() == free_at_start
    assert manager.reset_prefix_cache()


def test_sinks_outlive_their_tails_in_the_cache():
    """Under pressure the tail of a cached prefix goes first: no orphan tails."""
    policy, size = RetentionPolicy(16, 32), 16
    manager = make_manager(policy, size, num_blocks=12)
    init_none_hash(sha256)
    hasher = get_request_block_hasher(size, sha256)
    pool = manager.block_pool

    def finish(name, tokens):
        request = Request(
            name, tokens, SamplingParams(max_tokens=9), None, block_hasher=hasher
        )
        for start in range(0, len(tokens), size):
            assert manager.allocate_slots(request, min(size, len(tokens) - start))
            request.num_computed_tokens = min(start + size, len(tokens))
        manager.free(request)
        return request

    first = finish("a", list(range(100)))
    for pressure in range(1, 12):
        taken = pool.get_new_blocks(pressure)
        cached = [
            pool.get_cached_block(block_hash, [0]) is not None
            for block_hash in first.block_hashes
        ]
        assert cached[0] or not any(cached), "a tail without its sink"
        pool.free_blocks(taken)
