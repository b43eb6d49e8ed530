"""The block manager under its state machine (``tests/helpers/manager_machine.py``)."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager

from tests.helpers.manager_machine import STEPS, BlockManagerMachine
from vllm_sink.cache.block_manager import SinkManager


def run(steps: settings = STEPS) -> Counter:
    BlockManagerMachine.counts = Counter()
    run_state_machine_as_test(BlockManagerMachine, settings=steps)
    return BlockManagerMachine.counts


def test_the_manager_follows_the_oracle():
    counts = run()
    print(dict(counts))
    assert counts["steps"] >= 5000
    for what in (
        "hits",
        "preemptions",
        "out of blocks",
        "refused",
        "resumed with output",
        "extended in flight",
        "drafts rejected",
        "resets",
        "several groups",
        "reused gap",
        "reused tail",
        "long tails",
    ):
        assert counts[what] >= 5, f"the run must exercise {what}"


def frees_sinks(self, request_id, processed, num_prompt_tokens=None):
    last = self.policy.window_start(processed) // self.block_size
    self._remove_blocks_in_range(request_id, 0, last)


def frees_a_block_early(self, request_id, processed, num_prompt_tokens=None):
    first, last = self.policy.gap_blocks(processed, self.block_size)
    self._remove_blocks_in_range(request_id, first, last + 1)


def frees_twice(self, request_id):
    blocks = self.pop_blocks_for_free(request_id)
    self.block_pool.free_blocks(reversed(blocks))
    self.block_pool.free_blocks(blocks[:1])


def frees_sinks_first(self, request_id):
    self.block_pool.free_blocks(self.pop_blocks_for_free(request_id))


def leaks_the_last_block(self, request_id):
    blocks = self.pop_blocks_for_free(request_id)
    self.block_pool.free_blocks(reversed(blocks[:-1]))


def forgets_the_hit(self, request_id, num_tokens, *args, **kwargs):
    held = len(self.req_to_blocks.get(request_id, ()))
    return max(-(-num_tokens // self.block_size) - max(held, len(args[0])), 0)


def counts_the_gap(self, request_id, num_tokens, *args, **kwargs):
    return max(-(-num_tokens // self.block_size), 0)


def window_only(cls, **kwargs):
    return SlidingWindowManager.find_longest_cache_hit.__func__(cls, **kwargs)


def shorter_hit(cls, *args, **kwargs):
    blocks, length = original_hit(*args, **kwargs)
    if length == 0:
        return blocks, length
    size = kwargs["kv_cache_spec"].block_size
    return tuple(group[:-1] for group in blocks), length - size


def short_tail(cls, kv_cache_spec, **kwargs):
    half = replace(kv_cache_spec, sliding_window=kv_cache_spec.sliding_window // 2 + 1)
    return original_hit(kv_cache_spec=half, **kwargs)


def frees_nothing(self, *args, **kwargs):
    pass


original_hit = SinkManager.find_longest_cache_hit


@pytest.mark.parametrize(
    "method, mutant",
    [
        ("remove_skipped_blocks", frees_sinks),
        ("remove_skipped_blocks", frees_a_block_early),
        ("remove_skipped_blocks", frees_nothing),
        ("free", frees_twice),
        ("free", frees_sinks_first),
        ("free", leaks_the_last_block),
        ("get_num_blocks_to_allocate", forgets_the_hit),
        ("get_num_blocks_to_allocate", counts_the_gap),
        ("find_longest_cache_hit", classmethod(window_only)),
        ("find_longest_cache_hit", classmethod(shorter_hit)),
        ("find_longest_cache_hit", classmethod(short_tail)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_mutants_are_noticed(method, mutant, monkeypatch):
    monkeypatch.setattr(SinkManager, method, mutant)
    # AssertionError: the oracle's or vLLM's; ValueError: vLLM's "not enough blocks".
    with pytest.raises((AssertionError, ValueError)):
        run()
