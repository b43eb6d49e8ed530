"""Heads of two policies in groups of one size, as vLLM plans them, and their memory."""

import random

import pytest
import torch
from vllm.v1.core.kv_cache_utils import _get_kv_cache_groups_uniform_page_size
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_sink.cache.spec import SinkSpec
from vllm_sink.policy.config import SinkConfig
from vllm_sink.policy.draft_heads import DraftHeads
from vllm_sink.policy.grouping import (
    MAX_GROUPS,
    Grouping,
    RequestMemory,
    Workers,
    choose_grouping,
    heads_held,
    heads_of_workers,
)
from vllm_sink.policy.head_map import HeadMap
from vllm_sink.policy.layout import RetentionPolicy

FULL = FullAttentionSpec(
    block_size=16, num_kv_heads=1, head_size=64, dtype=torch.float32
)
STREAMING = SinkSpec.from_full(FULL, SinkConfig())


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.25, 0.33, 0.5, 0.68, 0.75, 0.9])
def test_vllm_groups_as_planned(workers, share):
    """Dealt out by vLLM, every worker has the same number of places in each group."""
    rng = random.Random(int(1000 * share) + workers)
    kinds = [[rng.random() < share for _ in range(60)] for _ in range(workers)]
    kinds[0][0] = True
    counts = [(sum(kind), 60 - sum(kind)) for kind in kinds]
    grouping = choose_grouping(counts)
    assert grouping.num_groups <= MAX_GROUPS
    specs = {}
    for worker, kind in enumerate(kinds):
        for head, is_retrieval in enumerate(kind):
            specs[f"{worker}.{head}"] = FULL if is_retrieval else STREAMING
            if head == 0:
                missing = grouping.padding(*counts[worker])
                for spec, count in zip((FULL, STREAMING), missing, strict=True):
                    for i in range(count):
                        name = f"{worker}.padding{type(spec).__name__}{i}"
                        specs[name] = spec
    groups = _get_kv_cache_groups_uniform_page_size(specs)
    assert len(groups) == grouping.num_groups
    full = [g for g in groups if type(g.kv_cache_spec) is FullAttentionSpec]
    assert len(full) == grouping.num_retrieval
    for group in groups:
        for worker in range(workers):
            mine = [n for n in group.layer_names if n.startswith(f"{worker}.")]
            assert len(mine) == grouping.size


@pytest.mark.parametrize(
    "counts, expected",
    [
        ([(45, 45)], Grouping(45, 1, 1)),
        ([(23, 67)], Grouping(23, 1, 3)),
        ([(30, 60)], Grouping(30, 1, 2)),
        # Nine groups of ten would waste nothing; eight of twelve are not many.
        ([(10, 80)], Grouping(12, 1, 7)),
        # Not one group of 68: 22 streaming heads would hold as much as 68.
        ([(68, 22)], Grouping(23, 3, 1)),
        ([(90, 0)], Grouping(90, 1, 0)),
        ([(0, 90)], Grouping(90, 0, 1)),
        # Two workers: 12 retrieval heads on one, 25 streaming heads on the other.
        ([(5, 25), (12, 18)], Grouping(13, 1, 2)),
    ],
)
def test_choice(counts, expected):
    assert choose_grouping(counts) == expected


def test_workers_hold_heads_of_their_rank_and_stage():
    heads = HeadMap(((True, False, False, True), (True, True, False, False)))
    low, high = range(0, 2), range(2, 4)
    assert [heads_held(heads, 2, rank) for rank in range(2)] == [low, high]
    assert heads_of_workers(heads, 2).counts == {(0, low): (3, 1), (0, high): (1, 3)}
    stages = [range(1), range(1, 2)]
    counts = {
        (0, low): (1, 1),
        (1, low): (2, 0),
        (0, high): (1, 1),
        (1, high): (0, 2),
    }
    assert heads_of_workers(heads, 2, stages).counts == counts
    # A drafter's two layers of four heads are beside the last stage's.
    draft = DraftHeads(2, 4, is_retrieval=False)
    workers = heads_of_workers(heads, 2, stages, draft)
    counts |= {(1, low): (2, 4), (1, high): (0, 6)}
    assert workers == Workers(counts, 4)
    assert workers.grouping == Grouping(4, 1, 2)
    assert [workers.grouping.num_of_kind(kind) for kind in (True, False)] == [1, 2]
    draft = DraftHeads(1, 1, is_retrieval=True)  # both ranks hold its head
    counts |= {(1, low): (3, 0), (1, high): (1, 2)}
    assert heads_of_workers(heads, 2, stages, draft) == Workers(counts, 1)


def test_layers_are_counted_where_none_is_split():
    layers = HeadMap(((True, True), (False, False), (False, False)))
    assert [heads_held(layers, 2, rank) for rank in range(2)] == [range(1)] * 2
    assert heads_of_workers(layers, 2).counts == {(0, range(1)): (1, 2)}
    draft = DraftHeads(2, 2, is_retrieval=True)
    workers = heads_of_workers(layers, 2, [range(2), range(2, 3)], draft)
    counts = {(0, range(1)): (1, 1), (1, range(1)): (2, 1)}
    assert workers == Workers(counts, 2)


def test_a_drafters_heads_fit_into_one_group():
    assert choose_grouping([(1, 30)]) == Grouping(5, 1, 6)
    assert choose_grouping([(1, 30)], 8) == Grouping(8, 1, 4)
    assert choose_grouping([(20, 30)], 8) == choose_grouping([(20, 30)])


def test_half_of_the_heads_take_little_more_than_half_the_memory():
    """At 8,000 tokens at most 0.56 of dense, padding and slack included."""
    memory = RequestMemory(
        choose_grouping([(45, 45)]), 90, 2 * 128 * 64 * 4, 128, RetentionPolicy(4, 252)
    )
    assert memory.dense_bytes(8000) == 90 * 63 * 2 * 128 * 64 * 4
    assert memory.bytes(8000) / memory.dense_bytes(8000) < 0.56
    # A window of their own bounds the retrieval heads as well.
    bounded = RequestMemory(
        memory.grouping,
        90,
        memory.head_bytes,
        128,
        RetentionPolicy(4, 252),
        RetentionPolicy(4, 4092),
    )
    assert bounded.bytes(10**6) == bounded.bytes(10**5) < memory.bytes(8000)
