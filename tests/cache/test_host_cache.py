"""Chats that come back from host memory, in one engine on a CPU.

What an engine with a cold cache would answer is the dense reference's answer, which
knows neither blocks nor caches.
"""

import pytest

from tests.cache.test_pressure import add
from tests.helpers.host_cache import (
    BLOCK,
    BLOCK_BYTES,
    BUDGET_BLOCKS,
    S,
    W,
    check,
    check_unused,
    drain,
    halves,
    host_engine,
    push_out,
    run,
    tokens,
)
from tests.helpers.random_llama import save_llama
from tests.helpers.reference import DenseReference


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("host-cache"))


@pytest.fixture(scope="module")
def dense(model):
    return DenseReference(model)


@pytest.fixture(scope="module")
def plain(model):
    """A pool of two requests or so, a host of a hundred chats."""
    with host_engine(model, host_bytes=300 * BLOCK_BYTES) as llm:
        yield llm


def plain_reference(dense):
    return lambda t: dense.logprobs(t, S, W)


def test_a_chat_comes_back(plain, dense):
    """Past the window, its sinks cold, too: what is loaded is all that it reads."""
    prompt = tokens(1, 300)
    first, *_ = run(plain, prompt, 50)
    push_out(plain)
    again = prompt + first + tokens(2, 20)
    answer = run(plain, again)
    assert plain.lookups[-1][:2] == (0, (300 + 49) // BLOCK * BLOCK)
    check(answer, again, plain_reference(dense))
    check_unused(plain)


def test_the_prompt_comes_back_after_another_answer(plain, dense):
    """Templates may drop an answer's reasoning: the prompt's own end is kept."""
    prompt = tokens(3, 290)
    run(plain, prompt, 150)
    push_out(plain)
    again = prompt + tokens(4, 40)
    answer = run(plain, again)
    assert answer[2] == 288
    check(answer, again, plain_reference(dense))


def test_sinks_that_the_pool_has_are_not_loaded(plain, dense):
    """The pool's hit, and behind it the host's window."""
    prompt = tokens(5, 300)
    run(plain, prompt, 2)
    push_out(plain)
    run(plain, prompt[:40], 2)  # computes the sinks' block anew
    answer = run(plain, prompt)
    assert plain.lookups[-1][:2] == (BLOCK, 288 - BLOCK)
    check(answer, prompt, plain_reference(dense))


def test_a_load_that_fails_is_computed_anew(plain, dense, monkeypatch):
    prompt = tokens(6, 300)
    run(plain, prompt, 2)
    push_out(plain)
    _, worker = halves(plain)

    def fail(name, slots, blocks):
        for region in worker.copier.regions:
            region[blocks] = -1  # half a copy
        raise RuntimeError("no such memory")

    monkeypatch.setattr(worker.copier, "load", fail)
    answer = run(plain, prompt)
    assert answer[2] == 0
    check(answer, prompt, plain_reference(dense))
    check_unused(plain)
    monkeypatch.undo()
    # What failed is forgotten; what was computed anew is kept anew.
    push_out(plain)
    answer = run(plain, prompt)
    assert answer[2] == 288
    check(answer, prompt, plain_reference(dense))


def test_a_slot_that_holds_something_else_fails_the_load(plain, dense):
    prompt = tokens(7, 300)
    run(plain, prompt, 2)
    push_out(plain)
    _, worker = halves(plain)
    before = list(worker._serials)
    worker._serials[:] = [serial + 1 for serial in before]
    answer = run(plain, prompt)
    worker._serials[:] = before
    assert answer[2] == 0
    check(answer, prompt, plain_reference(dense))


def test_preempted_requests_come_back(plain, dense):
    prompts = {str(i): tokens(20 + i, 40) for i in range(4)}
    push_out(plain)
    for name, prompt in prompts.items():
        add(plain, name, prompt, 200)
    plain.lookups.clear()
    answers = drain(plain)
    assert any(found for _, found, preempted in plain.lookups if preempted)
    for name, prompt in prompts.items():
        check(answers[name], prompt, plain_reference(dense))
    check_unused(plain)


def test_an_abort_while_it_loads(plain, dense):
    prompt = tokens(8, 300)
    run(plain, prompt, 2)
    push_out(plain)
    _, worker = halves(plain)
    worker.take_ended = lambda: (set(), set())  # never, it seems
    add(plain, "aborted", prompt, 5)
    add(plain, "beside", prompt[:20], 5)
    for _ in range(3):
        plain.llm_engine.step()
    scheduler, _ = halves(plain)
    assert scheduler._loading
    plain.llm_engine.abort_request(["aborted"])
    plain.llm_engine.step()
    del worker.take_ended
    drain(plain)
    plain.llm_engine.step()
    check_unused(plain)
    answer = run(plain, prompt)
    check(answer, prompt, plain_reference(dense))


def test_a_reset_prefix_cache_takes_the_host_with_it(plain):
    prompt = tokens(9, 300)
    run(plain, prompt, 2)
    scheduler, _ = halves(plain)
    assert scheduler.store.num_used
    assert plain.reset_prefix_cache()
    assert run(plain, prompt, 2)[2] == 0
    assert scheduler.store.num_used <= BUDGET_BLOCKS + 1
