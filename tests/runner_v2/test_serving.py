"""Runner V2 answers as the CPU path on runner V1 does, and a broken policy shows."""

from dataclasses import dataclass

import pytest

from tests.helpers.random_gemma import save_gemma
from tests.helpers.random_llama import save_llama
from tests.runner_v2.graphs import replay_graphs
from tests.runner_v2.serving import (
    BLOCK,
    PROMPTS,
    SINKS,
    SMALL,
    WINDOW,
    Reply,
    ask,
    assert_policy_shows,
    assert_same,
    first_turn,
    lose_sinks,
    random_tokens,
    scored,
    second_turn,
    serving,
)


@dataclass
class Answers:
    """What an engine says to each of the tests' questions."""

    first: list[Reply]
    second: list[Reply]
    scored: list[Reply]


@pytest.fixture(scope="module", params=["llama", "hybrid"])
def model(request, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        save_llama(folder, **SMALL)
    else:
        save_gemma(folder, **SMALL, head_dim=32, sliding_window=24)
    return str(folder)


@pytest.fixture(scope="module")
def want(model) -> Answers:
    """The CPU path's, on runner V1."""
    with serving(model, "v1") as llm:
        first = first_turn(llm)
        return Answers(first, second_turn(llm, first), scored(llm))


@pytest.fixture(scope="module")
def llm(model, want):
    with serving(model, "v2") as llm:
        yield llm


def test_prompts_in_chunks_and_prefix_hits(llm, want):
    assert_same(first_turn(llm), want.first)
    answers = second_turn(llm, want.first)
    assert_same(answers, want.second)
    with_a_gap = SINKS + WINDOW + 2 * BLOCK
    assert all(answer.cached >= with_a_gap for answer in answers)


def test_every_token_of_a_prompt(llm, want):
    assert_same(scored(llm), want.scored)


def test_graphs(model, llm, want):
    kinds = {
        "FULL": {"mixed"},
        "FULL_DECODE_ONLY": {"decode"},
        "FULL_AND_PIECEWISE": {"decode", "piecewise"},
    }
    # One mode shows that a second group of layers has captured metadata of its own.
    for mode in kinds if "llama" in model else ["FULL"]:
        with pytest.MonkeyPatch.context() as patches:
            used = replay_graphs(llm, mode, patches)
            assert_same(first_turn(llm), want.first)
            assert set(used) == kinds[mode], used


def shows(test):
    """A mistake that the tests above would see: one model tells, on one vLLM."""
    return pytest.mark.power(
        pytest.mark.parametrize("model", ["llama"], indirect=True)(test)
    )


def ignore_in_kernels(monkeypatch, **changes) -> None:
    """Every layer with sinks runs its kernels with these arguments instead."""
    from vllm_sink.attention import gpu

    arguments, find = gpu.AttentionArgs, gpu.SinkGpuImpl._find_launchers

    def ignore(**kwargs):
        sinks = kwargs["num_sink_tokens"]
        return arguments(**(kwargs | (changes if sinks else {})))

    def find_again(impl, *args):  # launches that were prepared stay as they are
        prepared, impl._launchers = impl._launchers, {}
        try:
            return find(impl, *args)
        finally:
            impl._launchers = prepared

    monkeypatch.setattr(gpu, "AttentionArgs", ignore)
    monkeypatch.setattr(gpu.SinkGpuImpl, "_find_launchers", find_again)


@shows
def test_a_wider_mask_shows(llm, want, monkeypatch):
    ignore_in_kernels(monkeypatch, window_size=WINDOW + 1)
    assert_policy_shows(scored(llm)[0], want.scored[0], PROMPTS[1])


@shows
def test_a_missing_turn_shows(llm, want, monkeypatch):
    ignore_in_kernels(monkeypatch, cos_sin_cache=None)
    assert_policy_shows(scored(llm)[0], want.scored[0], PROMPTS[1])


@shows
def test_missing_eviction_shows(llm, monkeypatch):
    from vllm_sink.cache.block_manager import SinkManager

    monkeypatch.setattr(SinkManager, "remove_skipped_blocks", lambda *a, **k: None)
    try:
        with pytest.raises(AssertionError, match=r"holds \d+ blocks of"):
            ask(llm, [random_tokens(3, 230)], 1)
    finally:
        monkeypatch.undo()
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()


@shows
def test_a_lost_sink_block_shows(llm, want, monkeypatch):
    lose_sinks(monkeypatch)
    assert_policy_shows(scored(llm)[0], want.scored[0], PROMPTS[1])
