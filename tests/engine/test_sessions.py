"""Endless sessions: exact past the window, in memory that stays flat."""

import asyncio
import random

import pytest
import torch
from prometheus_client import REGISTRY
from vllm import SamplingParams

from tests.helpers.random_llama import save_llama
from tests.helpers.reference import DenseReference
from tests.helpers.sessions import Session, async_engine
from vllm_sink.policy.layout import RetentionPolicy

POLICY = RetentionPolicy(4, 60)
BLOCK, CHUNK = 32, 64
OPTIONS = {
    "block_size": BLOCK,
    "max_num_batched_tokens": CHUNK,
    "max_model_len": 2048,
    "hf_overrides": {"max_position_embeddings": 2048},
}
TOLERANCE = 2e-3  # of a log-probability, float32


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tiny_reference(llama) -> DenseReference:
    return DenseReference(llama)


def turns_of(seed: int, count: int = 6) -> list[list[int]]:
    """Turns of 1 to 150 tokens: shorter and longer than the window and a chunk."""
    rng = random.Random(seed)
    lengths = [150, 1, *(rng.randrange(20, 150) for _ in range(count - 2))]
    return [[rng.randrange(512) for _ in range(length)] for length in lengths]


def check(session: Session, reference: DenseReference) -> None:
    """Each answer's log-probabilities are those of the whole history."""
    assert len(session.scored) == len(session.turns)
    assert len(session.scored[-1][0]) > 4 * POLICY.budget
    for history, answer, scores in session.scored:
        want = reference.logprobs(
            history + answer, POLICY.num_sink_tokens, POLICY.window_size
        )[len(history) - 1 :]
        assert (torch.tensor(scores) - want).abs().max() < TOLERANCE


def metric(name: str) -> float:
    return sum(
        sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name == name
    )


async def ask(engine, name: str, tokens: list[int]) -> None:
    """An ordinary request, for the pool's sake."""
    params = SamplingParams(max_tokens=150, ignore_eos=True, detokenize=False)
    async for _ in engine.generate({"prompt_token_ids": tokens}, params, name):
        pass


async def sessions_under_pressure(engine, sessions: list[Session], bound: int):
    """Beside ordinary requests and strangers aborted in mid-turn; then none is left."""
    live = []
    # Engines that this process ran before may have been shut down at work.
    others = metric("vllm:sink_live_blocks")

    def look() -> None:
        live.append(metric("vllm:sink_live_blocks") - others)

    strangers = [Session(turns_of(90 + i, 40), 8) for i in range(2)]
    doomed = [
        asyncio.ensure_future(stranger.run(engine, f"stranger-{i}"))
        for i, stranger in enumerate(strangers)
    ]
    running = asyncio.gather(
        *(ask(engine, f"plain-{i}", turns_of(i)[0] * 2) for i in range(12)),
        *(
            session.run(engine, f"session-{i}", look)
            for i, session in enumerate(sessions)
        ),
    )
    while not all(len(stranger.scored) >= 3 for stranger in strangers):
        assert not running.done() or not running.exception(), running.exception()
        await asyncio.sleep(0.02)
    for task in doomed:
        task.cancel()
    await asyncio.gather(*doomed, return_exceptions=True)
    await running
    for _ in range(100):  # the last frees are a step later
        if metric("vllm:sink_live_blocks") == others:
            break
        await asyncio.sleep(0.05)
    assert metric("vllm:sink_live_blocks") == others
    assert 0 < max(live) <= bound


def test_preempted_sessions_are_exact_and_flat(llama, tiny_reference, monkeypatch):
    """A pool for five sessions at rest, and a dozen other requests in it.

    vLLM never preempts a session that waits for its turn: five at rest must fit.
    """
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    pool = 28
    sessions = [Session(turns_of(seed, 8), 12) for seed in range(3)]
    options = {**OPTIONS, "num_gpu_blocks_override": pool}
    with async_engine(
        llama, POLICY.num_sink_tokens, POLICY.window_size, **options
    ) as engine:
        before = metric("vllm:num_preemptions_total")
        work = sessions_under_pressure(engine, sessions, pool - 1)
        asyncio.run(asyncio.wait_for(work, 240))
        preempted = metric("vllm:num_preemptions_total") - before
    for session in sessions:
        check(session, tiny_reference)
        # vLLM extends the caller's list by the turns that follow.
        assert len(session.first_prompt) > len(session.turns[0])
    assert preempted > 0, "the pool was to run dry"
