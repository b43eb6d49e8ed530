"""Whole engines on a CPU with host memory behind their pool."""

import contextlib
import itertools
import random

import torch

from tests.cache.test_pressure import add, result
from tests.helpers.engine import core, model_runner, sink_engine

TOLERANCE = 1e-4  # log-probability, float32
BLOCK = 32
S, W = 4, 60
BUDGET_BLOCKS = 1 + 2  # sinks and window of a hit
BLOCK_BYTES = 3 * 2 * 2 * 32 * 4 * BLOCK  # of three layers of two heads
fillers = itertools.count(1000)  # seeds of prompts that nobody sent before


def tokens(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(512), k=count)


@contextlib.contextmanager
def host_engine(model, *, host_bytes, num_blocks=12, **kwargs):
    transfer = dict(
        kv_connector="SinkHostCache",
        kv_role="kv_both",
        kv_connector_extra_config=dict(host_cache_gib=host_bytes / 2**30),
    )
    with sink_engine(
        model,
        S,
        W,
        num_gpu_blocks_override=num_blocks,
        kv_transfer_config=transfer,
        block_size=BLOCK,
        max_num_batched_tokens=64,
        max_model_len=1024,
        max_num_seqs=4,
        skip_tokenizer_init=True,
        **kwargs,
    ) as llm:
        llm.lookups = []
        scheduler, _ = halves(llm)
        match = scheduler.match

        def look(request, num_hit_tokens):
            found = match(request, num_hit_tokens)
            llm.lookups.append((num_hit_tokens, found, request.num_preemptions))
            return found

        scheduler.match = look
        yield llm


def halves(llm):
    """The scheduler's half and the worker's."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return core(llm).scheduler.connector.scheduler, get_kv_transfer_group().worker


def drain(llm, on_step=lambda: None) -> dict:
    """{request id: (tokens, log-probabilities, tokens that were cached)}."""
    finished = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                finished[output.request_id] = *result(output), output.num_cached_tokens
        on_step()
    return finished


def run(llm, prompt, count=20):
    add(llm, "one", prompt, count)
    return drain(llm)["one"]


def push_out(llm) -> None:
    """Fill the pool with others' blocks, and then all of it with NaN.

    Whatever of a chat is read that was not loaded shows.
    """
    for _ in range(3):
        run(llm, tokens(next(fillers), 900), 2)
    for cache in model_runner(llm).kv_caches:
        cache.fill_(float("nan"))


def check(answer, prompt, reference) -> None:
    """An answer's log-probabilities are the reference's."""
    chosen, logprobs, _ = answer
    want = reference(prompt + chosen)[len(prompt) - 1 :]
    assert float((torch.tensor(logprobs) - want).abs().max()) < TOLERANCE


def check_unused(llm) -> None:
    """Nothing is left under way; the pool is whole."""
    scheduler, _ = halves(llm)
    assert not scheduler._loading and not scheduler._requests
    pool = core(llm).scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    held = sum(len(turn.entries) for turn in scheduler.store.turns.values())
    assert held == sum(entry.holders for entry in scheduler.store.entries.values())
