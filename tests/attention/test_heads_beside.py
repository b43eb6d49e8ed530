"""Heads of two policies beside layers of other kinds: hits, pressure, several maps.

What each architecture gives in one pass is in tests/zoo.
"""

import pytest
import torch
from vllm import SamplingParams

from tests.helpers.engine import core, managers, prompt_logprobs, sink_engine
from tests.helpers.random_gemma import save_gemma
from tests.helpers.reference import load, logprobs
from vllm_sink.cache.block_manager import SinkManager
from vllm_sink.cache.counted import RetrievalManager

TOLERANCE = 2e-3
S, W, BLOCK = 4, 60, 32
OWN = [9, 9]  # of a layer with a window of its own: ignored
POOL = 48
SETTINGS = {
    "block_size": BLOCK,
    "max_model_len": 600,
    "max_num_batched_tokens": 96,
    "skip_tokenizer_init": True,
    "async_scheduling": False,
}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """(folder, reference model): layers 1 and 3 are governed, 2 KV heads each."""
    path = str(tmp_path_factory.mktemp("gemma"))
    save_gemma(path)
    return path, load(path)


def random_tokens(seed: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 512, (count,), generator=generator).tolist()


def generate(llm, prompts, max_tokens=24):
    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0
    )
    prompts = [{"prompt_token_ids": tokens} for tokens in prompts]
    return llm.generate(prompts, params, use_tqdm=False)


def check_generated(model, outputs, rows) -> None:
    """Each token is the reference's, and as likely."""
    for output in outputs:
        (reply,) = output.outputs
        tokens = [*output.prompt_token_ids, *reply.token_ids]
        want = logprobs(model, tokens, S, W, "cache", heads=rows)
        want = want[-len(reply.token_ids) :]
        got = torch.tensor(
            [
                entry[token].logprob
                for entry, token in zip(reply.logprobs, reply.token_ids, strict=True)
            ]
        )
        assert (got - want).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "rows, runs_dry",
    [
        ([OWN, [1, 0], OWN, [0, 1]], True),
        ([[1, 1], [0, 1]], True),  # the governed layers' alone
        ([OWN, [1, 1], OWN, [0, 0]], False),  # whole layers
    ],
    ids=["split", "governed rows", "whole layers"],
)
def test_chunks_hits_and_pressure(gemma, rows, runs_dry):
    path, model = gemma
    full = rows if len(rows) == 4 else [OWN, rows[0], OWN, rows[1]]
    prompt = random_tokens(1, 500)
    with sink_engine(
        path,
        S,
        W,
        retrieval=dict(heads=rows),
        num_gpu_blocks_override=POOL,
        max_num_seqs=6,
        **SETTINGS,
    ) as llm:
        kinds = [type(manager) for manager in managers(llm)]
        assert SinkManager in kinds and RetrievalManager in kinds
        (got,) = prompt_logprobs(llm, [prompt])
        want = logprobs(model, prompt, S, W, "cache", heads=full)
        assert (got - want).abs().max() < TOLERANCE
        other = [[1 - head for head in row] if row != OWN else row for row in full]
        swapped = logprobs(model, prompt, S, W, "cache", heads=other)
        assert (got - swapped).abs().max() > 20 * TOLERANCE
        # A second turn hits what the first one left.
        (first,) = generate(llm, [prompt])
        history = [*prompt, *first.outputs[0].token_ids, *random_tokens(2, 9)]
        (second,) = generate(llm, [history])
        assert second.num_cached_tokens >= 400
        check_generated(model, [first, second], full)
        # More requests than the pool holds: some are preempted, none is wrong.
        preempted = set()
        scheduler = core(llm).scheduler
        real = scheduler._preempt_request

        def preempt(request, *args, **kwargs):
            preempted.add(request.request_id)
            return real(request, *args, **kwargs)

        scheduler._preempt_request = preempt
        crowd = [random_tokens(10 + i, 200) for i in range(6)]
        check_generated(model, generate(llm, crowd, max_tokens=120), full)
        assert preempted or not runs_dry
        assert llm.reset_prefix_cache()
        free = managers(llm)[0].block_pool.get_num_free_blocks()
        assert free == POOL - 1  # all but the null block
