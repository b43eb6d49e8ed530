"""Host memory that is full, and heads of two kinds: engines one after another.

vLLM has one connector a process: two such engines don't live at once.
"""

import pytest

from tests.helpers.host_cache import (
    BLOCK,
    BLOCK_BYTES,
    BUDGET_BLOCKS,
    TOLERANCE,
    S,
    W,
    check,
    check_unused,
    halves,
    host_engine,
    push_out,
    run,
    tokens,
)
from tests.helpers.random_gemma import save_gemma
from tests.helpers.random_llama import save_llama
from tests.helpers.reference import DenseReference, HeadsReference

HEADS = [[1, 0], [0, 1], [0, 0]]  # retrieval heads


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("host-cache"))


@pytest.fixture(scope="module")
def dense(model):
    return DenseReference(model)


def test_a_store_that_is_full(model, dense):
    """Two chats fit: the one that was idle longest is computed anew."""
    prompts = [tokens(30 + i, 300) for i in range(3)]
    num_slots = 2 * (BUDGET_BLOCKS + 1)
    host_bytes = (num_slots + 0.5) * BLOCK_BYTES
    with host_engine(model, host_bytes=host_bytes, num_blocks=8) as llm:
        scheduler, _ = halves(llm)
        assert scheduler.store.num_slots == num_slots
        for prompt in prompts:
            run(llm, prompt, 2)
        answers = [run(llm, prompt, 5) for prompt in reversed(prompts)]
        assert [cached for *_, cached in answers] == [288, 288, 0]
        for answer, prompt in zip(answers, reversed(prompts), strict=True):
            check(answer, prompt, lambda t: dense.logprobs(t, S, W))
        check_unused(llm)


@pytest.mark.parametrize("window, num_blocks", [(None, 60), (150, 30)])
def test_heads_of_two_kinds_come_back(model, dense, window, num_blocks):
    """Each kind brings what it needs."""
    prompt = tokens(40, 300)
    with host_engine(
        model,
        host_bytes=300 * BLOCK_BYTES,
        num_blocks=num_blocks,
        retrieval=dict(heads=HEADS, window_size=window),
    ) as llm:
        expected = HeadsReference(dense, HEADS, S, W, window)
        first, *_ = run(llm, prompt, 50)
        push_out(llm)
        again = prompt + first + tokens(41, 20)
        answer = run(llm, again)
        assert llm.lookups[-1][:2] == (0, (300 + 49) // BLOCK * BLOCK)
        check(answer, again, expected.logprobs)
        check_unused(llm)


@pytest.mark.parametrize(
    "heads, num_blocks",
    [(None, 20), ([[1, 0], [0, 0]], 60)],
    ids=["one policy", "heads of two kinds"],
)
def test_layers_with_their_own_windows_come_back(tmp_path, heads, num_blocks):
    save_gemma(tmp_path, head_dim=32, sliding_window=24, hidden_size=64)
    dense = DenseReference(str(tmp_path))
    prompt = tokens(50, 300)
    retrieval = heads and {"retrieval": dict(heads=heads)}
    with host_engine(
        str(tmp_path), host_bytes=3 * 2**20, num_blocks=num_blocks, **retrieval or {}
    ) as llm:
        first, *_ = run(llm, prompt, 50)
        push_out(llm)
        again = prompt + first + tokens(51, 20)
        got = run(llm, again)
        unit = halves(llm)[0].lookup.alignment
        assert (unit > BLOCK) == bool(heads), "slots of larger blocks"
        assert llm.lookups[-1][:2] == (0, (300 + 49) // unit * unit)
        rows = [row for own in heads or [[0, 0]] * 2 for row in ([0, 0], own)]
        check(got, again, HeadsReference(dense, rows, S, W).logprobs)
        check_unused(llm)
        assert llm.reset_prefix_cache()
        want = run(llm, again)
        assert want[2] == 0
    assert got[0] == want[0]
    assert got[1] == pytest.approx(want[1], abs=TOLERANCE)
