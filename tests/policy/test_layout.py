"""The policy's arithmetic at its edges."""

import pytest

from vllm_sink.policy.layout import RetentionPolicy


@pytest.mark.parametrize(
    "policy, seen",
    [
        ((2, 3), [0, 1, 4, 5, 6]),
        ((0, 3), [4, 5, 6]),
        ((2, 1), [0, 1, 6]),
        ((5, 3), [0, 1, 2, 3, 4, 5, 6]),
        ((9, 1), [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_mask_of_a_query(policy, seen):
    """The sinks and the window, its own position included, and no later one."""
    assert [key for key in range(12) if RetentionPolicy(*policy).sees(6, key)] == seen


def test_nothing_is_longer_than_the_longest_request():
    assert RetentionPolicy(40, 1 << 40).clipped(64) == RetentionPolicy(40, 64)
    assert RetentionPolicy(1 << 40, 3).clipped(64) == RetentionPolicy(64, 3)


@pytest.mark.parametrize("in_flight", [1, 8, 20])
@pytest.mark.parametrize("size", [1, 8, 16])
@pytest.mark.parametrize("policy", [(4, 60), (0, 33), (20, 1), (3, 5), (40, 24)])
def test_the_bound_is_what_a_request_holds_at_most(policy, size, in_flight):
    """Reached, too, unless the window's tokens are one more than whole blocks."""
    policy = RetentionPolicy(*policy)
    most = 0
    for n in range(200):
        blocks = range(-(-(n + in_flight) // size))
        kept = [
            block
            for block in blocks
            if any(
                token >= n or policy.sees(n, token)
                for token in range(block * size, (block + 1) * size)
            )
        ]
        most = max(most, len(kept))
        shorter = policy.max_blocks(in_flight, n + in_flight, size)
        assert len(kept) <= shorter <= len(blocks)
    bound = policy.max_blocks(in_flight, 10**6, size)
    is_reached = (policy.window_size - 2 + in_flight) % size != 0
    assert bound == most if is_reached else most <= bound <= most + 1
