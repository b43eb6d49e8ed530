"""The order in which free blocks are reused, each kind by itself."""

from __future__ import annotations

import random

import pytest
from vllm.v1.core.block_pool import BlockPool

from tests.cache.test_prefix_hits import Server, text
from tests.helpers.block_managers import full_spec, manager_of_specs, sink_spec
from vllm_sink.cache import free_order
from vllm_sink.cache.free_order import FreeOrder
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.start.groups import settle_order

BLOCK = 16
POLICY = RetentionPolicy(4, 4 * BLOCK)  # a turn's tail: the sinks' block and 5 more


def small_server(num_blocks: int, heads: bool = False, **config) -> Server:
    specs = [sink_spec(POLICY, BLOCK), *([full_spec(BLOCK)] if heads else [])]
    config = dict(max_model_len=4000, max_in_flight_tokens=4 * BLOCK) | config
    return Server(manager_of_specs(specs, num_blocks + 1, **config), 4 * BLOCK)


def serve_others(server: Server, count: int) -> None:
    """Prompts of seven blocks, each of which is then an idle chat's tail."""
    for seed in range(count):
        server.serve(text(1000 + seed, 7 * BLOCK), [])


def chat(seed: int) -> list[int]:
    return text(seed, 100)


def test_blank_blocks_go_before_anything_cached():
    """A gap serves others as long as there is room that nobody needs."""
    server = small_server(40)
    long = text(0, 20 * BLOCK)
    server.serve(long, [])
    server.serve(chat(1), [])  # 7 blocks: 20 were used of 40
    assert server.serve(long[: 10 * BLOCK] + text(2, BLOCK), []) == 10 * BLOCK


def test_a_long_prefill_reuses_its_own_gap_before_the_tails_of_idle_chats():
    server = small_server(40)
    for seed in range(4):
        server.serve(chat(seed), [])
    server.serve(text(9, 2000), [])
    for seed in range(4):
        assert server.serve(chat(seed) + text(20 + seed, 30), []) == 6 * BLOCK


def test_the_start_of_a_gap_outlives_its_end():
    server = small_server(30)
    long = text(0, 24 * BLOCK)
    server.serve(long, [])
    server.serve(text(1, 12 * BLOCK), [])  # takes the 6 blank and more
    assert server.serve(long[: 8 * BLOCK] + text(2, 9), []) == 8 * BLOCK
    assert server.serve(long[: 16 * BLOCK] + text(3, 9), []) < 16 * BLOCK


@pytest.mark.parametrize("sent_anew", [True, False])
def test_retries_stay_until_the_chat_goes_on(sent_anew):
    """The prompt sent anew, or with another last message, hits like at first."""
    server = small_server(48)
    said = text(0, 12 * BLOCK)
    server.serve(said, text(1, 12 * BLOCK))
    first = said + text(1, 12 * BLOCK)
    second = first + text(2, 10 * BLOCK)
    assert server.serve(second, text(3, 12 * BLOCK)) == 24 * BLOCK
    serve_others(server, 4)  # 28 blocks: 2 are blank, of 41 in the gap 8 are retries
    resent = second if sent_anew else first + text(4, 5 * BLOCK)
    hit = server.serve(resent, [])
    assert hit == (33 * BLOCK if sent_anew else 24 * BLOCK)


def test_what_a_hit_takes_up_of_a_gap_is_a_tail_later():
    server = small_server(40)
    long = text(0, 24 * BLOCK)
    server.serve(long, [])
    part = long[: 8 * BLOCK] + text(1, BLOCK)
    assert server.serve(part, []) == 8 * BLOCK
    serve_others(server, 4)  # 28 blocks: 14 are blank, 15 in the gap
    assert server.serve(part + text(3, BLOCK), []) == 9 * BLOCK


def test_retries_are_gap_when_the_chat_has_gone_on():
    server = small_server(60)
    said = text(0, 12 * BLOCK)
    server.serve(said, text(1, 12 * BLOCK))
    gap = FreeOrder.of(server.manager.block_pool).gap
    assert len(gap) == 24 - 1 - 4 - 4, "all but sinks, window and the prompt's retries"
    said += text(1, 12 * BLOCK)
    server.serve(said + text(2, 5), [])
    assert len(gap) == 24 - 1 - 4
    serve_others(server, 7)
    assert server.serve(said + text(2, 5), []) == 24 * BLOCK


def test_what_several_share_outlives_the_tails_of_turns():
    """A start that other prompts parted from is spared so often as it was shared."""

    def start_survives(sharers: int, others: int) -> bool:
        server = small_server(30)
        start = text(0, 5 * BLOCK)
        for seed in range(sharers):
            server.serve(start + text(1 + seed, 2 * BLOCK), [])
        for seed in range(others):  # 7 blocks each; some of the 30 are blank yet
            server.serve(text(100 + seed, 7 * BLOCK), [])
        return server.serve(start + text(99, BLOCK), []) == 5 * BLOCK

    assert not start_survives(1, 5)
    assert start_survives(2, 5)
    assert not start_survives(2, 8)
    assert start_survives(4, 11)
    assert not start_survives(12, 20), "a share is for some rounds, not for ever"


def test_what_several_share_is_spared_in_a_gap_too():
    server = small_server(60)
    start = text(0, 20 * BLOCK)
    for seed in range(2):
        server.serve(start + text(1 + seed, 8 * BLOCK), [])
    server.serve(start + text(2, 8 * BLOCK) + text(4, 9), [])  # no retries any more
    serve_others(server, 6)  # 42 blocks: 22 are blank, 22 in the gap
    assert server.serve(start + text(3, BLOCK), []) == 20 * BLOCK


def test_a_chat_that_goes_on_shares_nothing():
    server = small_server(200)
    order = FreeOrder.of(server.manager.block_pool)
    said: list[int] = []
    for turn in range(6):
        said = said + text(turn, 40)
        answer = text(100 + turn, 40)
        server.serve(said, answer)
        server.serve(said, answer)  # and the same again
        said = said + answer
    assert not any(order.rounds.values())
    server.serve(said[:100] + text(9, 20), [])
    assert any(order.rounds.values())


def test_a_given_interval_ages_as_in_vllm():
    """What it keeps of a gap is no gap's block to us, and the rest isn't cached."""
    server = small_server(100, prefix_cache_retention_interval=10 * BLOCK)
    server.serve(text(0, 30 * BLOCK), [])
    manager = server.manager
    assert not FreeOrder.of(manager.block_pool).gap
    cached = sum(block.block_hash is not None for block in manager.block_pool.blocks)
    assert cached == 1 + 3 * 4 + 1  # sinks, a window's blocks thrice, the prompt's end


def test_groups_of_heads_share_one_order():
    """Streaming heads' gap makes way for retrieval heads' blocks."""
    server = small_server(90, heads=True)
    managers = server.manager.coordinator.single_type_managers
    assert managers[0].order is managers[1].order
    for seed in range(2):
        server.serve(chat(seed), [])
    server.serve(text(9, 40 * BLOCK), [])
    for seed in range(2):
        assert server.serve(chat(seed) + text(20 + seed, 9), []) == 6 * BLOCK


def test_another_pools_order_is_its_own():
    pools = [BlockPool(4, True, BLOCK) for _ in range(2)]
    orders = [FreeOrder.of(pool) for pool in pools]
    assert orders[0] is not orders[1]
    assert FreeOrder.of(pools[0]) is orders[0]


def test_the_tables_forget_what_was_reused():
    server = small_server(40)
    settle_order(server.manager.coordinator)
    rng = random.Random(0)
    for seed in range(200):
        start = text(1000 + seed // 4, 3 * BLOCK)
        server.serve(start + text(seed, rng.randrange(20, 500)), text(seed, 30))
    order = FreeOrder.of(server.manager.block_pool)
    blocks = server.manager.block_pool.blocks
    assert order.long
    for table in (order.ends, order.rounds, order.long):
        for block_id, (block_hash, _) in table.items():
            assert blocks[block_id].block_hash == block_hash
    assert order.gap
    for block_id, block_hash in order.gap.items():
        assert blocks[block_id].block_hash == block_hash


def test_a_block_that_comes_to_hold_the_same_again_is_no_gap():
    """As after a reset: it is a tail now."""
    server = small_server(40)
    long = text(0, 20 * BLOCK)
    server.serve(long, [])
    order = FreeOrder.of(server.manager.block_pool)
    block = server.manager.block_pool.blocks[next(iter(order.gap))]
    order.forget([block])
    assert block.block_id not in order.gap


def test_a_long_history_outlives_younger_short_ones():
    """A tail that saves 2, 4, 8 … times what it takes goes 1, 2, 3 … rounds later."""

    def survives(blocks: int, others: int) -> bool:
        server = small_server(40)
        settle_order(server.manager.coordinator)
        said, answer = text(0, blocks * BLOCK - 9), text(1, 9)
        server.serve(said, answer)
        serve_others(server, others)
        hit = server.serve(said + answer + text(2, 9), [])
        return hit == blocks * BLOCK

    # Each holds 5 blocks, so 10 to 19 are worth a round: the time of 5 others.
    assert survives(9, 5) and not survives(9, 6)
    assert survives(10, 10) and not survives(10, 11)
    assert survives(19, 10) and not survives(19, 11)
    assert survives(20, 15) and not survives(20, 16)


def test_beside_other_groups_all_tails_age_alike():
    """What a hit needs of another group would go by age alone."""
    server = small_server(90, heads=True)
    settle_order(server.manager.coordinator)
    order = FreeOrder.of(server.manager.block_pool)
    server.serve(text(0, 30 * BLOCK), [])
    assert not order.weighs_tails and not order.long


def test_a_step_spares_so_many_blocks_and_no_more(monkeypatch):
    """Where all are to be spared the eldest goes, its last block first."""
    monkeypatch.setattr(free_order, "MOST_SPARED", 3)
    server = small_server(30)
    serve_others(server, 4)
    pool = server.manager.block_pool
    before = pool.free_block_queue.get_all_free_blocks()
    blank = [block for block in before if block.block_hash is None]
    tails = before[len(blank) :]
    order = FreeOrder.of(pool)
    order.long = {each.block_id: (each.block_hash, 1) for each in tails}
    order.make_way(len(blank) + 2)
    after = pool.free_block_queue.get_all_free_blocks()
    assert after == tails[:2] + blank + tails[3:] + tails[2:3]
