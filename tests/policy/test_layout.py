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
