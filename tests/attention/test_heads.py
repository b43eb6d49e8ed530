"""Heads of two policies on the real model equal an independent per-head mask."""

import pytest
import torch
from vllm import SamplingParams

from tests.helpers.engine import (
    core,
    managers,
    model_runner,
    prompt_logprobs,
    run_steps,
    sink_engine,
)
from tests.helpers.reference import HeadsReference, random_heads
from vllm_sink.cache.block_manager import SinkManager
from vllm_sink.policy.layout import RetentionPolicy

TOLERANCE = 2e-3  # log-probability, float32 (the bound)
S, W = 4, 60


def prompts_of(prose):
    """Four lengths at once: far past the window, past it, within it, a few tokens."""
    return [prose[:700], prose[5000:5257], prose[9000:9003], prose[20000:20129]]


def errors(measured, reference, prompts) -> list[float]:
    return [
        float((got - reference.logprobs(tokens)).abs().max())
        for tokens, got in zip(prompts, measured, strict=True)
    ]


def tiny_heads(num_retrieval: int, seed: int = 0):
    """Of the random model's 3 layers x 2 KV heads."""
    return random_heads(num_retrieval, seed, layers=3, kv_heads=2)


def tiny_prompts(text):
    return [text[:700], text[700:957], text[:3], text[200:329]]


@pytest.mark.parametrize(
    "heads, retrieval_window, block_size, chunk, positions",
    [
        (random_heads(68), None, 128, 64, "cache"),
        (random_heads(30, 1), 200, 32, 2048, "cache"),
    ],
)
def test_logprobs_equal_reference(
    model_path,
    reference,
    prose,
    heads,
    retrieval_window,
    block_size,
    chunk,
    positions,
):
    case = heads, retrieval_window, block_size, chunk, positions
    check_equals_reference(model_path, reference, prompts_of(prose), *case)


@pytest.mark.parametrize(
    "heads, retrieval_window, block_size, chunk, positions",
    [
        (tiny_heads(1), None, 32, 64, "cache"),
        (tiny_heads(3), None, 128, 2048, "cache"),
        (tiny_heads(4), None, 32, 2048, "cache"),
        (tiny_heads(3, 1), None, 128, 64, "absolute"),
        (tiny_heads(2, 1), 200, 32, 64, "cache"),
        ([[1, 1], [0, 0], [1, 1]], None, 32, 2048, "cache"),
        ([[1, 1], [0, 0], [0, 0]], 200, 128, 64, "cache"),
    ],
)
def test_logprobs_of_a_random_model(
    tiny_path,
    tiny_reference,
    tiny_text,
    heads,
    retrieval_window,
    block_size,
    chunk,
    positions,
):
    case = heads, retrieval_window, block_size, chunk, positions
    check_equals_reference(tiny_path, tiny_reference, tiny_prompts(tiny_text), *case)


def check_equals_reference(
    path, reference, prompts, heads, retrieval_window, block_size, chunk, positions
):
    """Four requests at once, in chunks, over blocks: one answer."""
    with sink_engine(
        path,
        S,
        W,
        positions=positions,
        retrieval=dict(heads=heads, window_size=retrieval_window),
        block_size=block_size,
        max_num_batched_tokens=chunk,
        max_num_seqs=4,
        max_model_len=1024,
    ) as llm:
        measured = prompt_logprobs(llm, prompts)
        assert len(managers(llm)) <= 8
    expected = HeadsReference(reference, heads, S, W, retrieval_window, positions)
    got = errors(measured, expected, prompts)
    print(f"{max(got):.1e}")
    assert max(got) < TOLERANCE
    # Neither kind is the other, nor are the kinds' heads other heads.
    swapped = [[1 - head for head in layer] for layer in heads]
    other = HeadsReference(reference, swapped, S, W, retrieval_window, positions)
    assert errors(measured[:1], other, prompts[:1])[0] > 100 * TOLERANCE


def test_generated_tokens_are_the_references_greedy_choice(
    model_path, reference, prose
):
    """100 tokens each of three requests; see test_exact for why that is enough."""
    prompts = [prose[3000:3017], prose[7000:7100], prose[800:1100]]
    heads = random_heads(30, 2)
    with sink_engine(
        model_path, S, W, retrieval=dict(heads=heads), max_model_len=1024
    ) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": tokens} for tokens in prompts],
            SamplingParams(temperature=0, max_tokens=100, ignore_eos=True),
            use_tqdm=False,
        )
    expected = HeadsReference(reference, heads, S, W)
    for tokens, output in zip(prompts, outputs, strict=True):
        generated = list(output.outputs[0].token_ids)
        assert len(generated) == 100
        logits = expected.logits(tokens + generated)
        choice = logits[len(tokens) - 1 : -1].argmax(-1).tolist()
        assert generated == choice


def test_all_heads_and_none(tiny_path, tiny_text):
    """All retrieval heads: stock attention. None: the plain policy, to the bit."""
    prompts = tiny_prompts(tiny_text)

    def measure(*policy, **retrieval):
        with sink_engine(
            tiny_path, *policy, retrieval=retrieval, max_model_len=1024
        ) as llm:
            return prompt_logprobs(llm, prompts), len(managers(llm))

    stock, _ = measure()
    plain, _ = measure(S, W)
    everything, num_groups = measure(S, W, heads=tiny_heads(6))
    assert num_groups == 1
    nothing, num_groups = measure(S, W, heads=tiny_heads(0))
    assert num_groups == 1
    for want, got in zip(stock, everything, strict=True):
        assert (got - want).abs().max() < TOLERANCE
    for want, got in zip(plain, nothing, strict=True):
        assert torch.equal(got, want)
    assert (stock[0] - plain[0]).abs().max() > 100 * TOLERANCE


def retained_blocks(llm) -> set[int]:
    """Ids of the blocks that some head may still read."""
    kept = set()
    for request in core(llm).scheduler.running:
        n = request.num_computed_tokens
        for blocks in managers(llm):
            size = blocks.block_size
            everything = RetentionPolicy(0, 1 << 40)
            policy = blocks.policy if isinstance(blocks, SinkManager) else everything
            for index, block in enumerate(blocks.req_to_blocks[request.request_id]):
                tokens = range(index * size, min((index + 1) * size, n))
                if any(policy.sees(n, token) for token in tokens):
                    assert not block.is_null
                    kept.add(block.block_id)
    return kept


SMALL = dict(
    num_gpu_blocks_override=160,
    max_num_batched_tokens=64,
    max_num_seqs=2,
    block_size=32,
    async_scheduling=False,
    max_model_len=1024,
)


@pytest.mark.parametrize("retrieval_window", [None, 200])
def test_nothing_outside_the_policies_is_read_or_held(
    tiny_path, tiny_text, retrieval_window
):
    """NaN in what no head retains; each kind's bound holds at every step."""
    prompts = [tiny_text[:700], tiny_text[700:790]]
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    retrieval = dict(heads=[[1, 0], [0, 1], [0, 0]], window_size=retrieval_window)
    with sink_engine(
        tiny_path, S, W, retrieval=retrieval, enable_prefix_caching=False, **SMALL
    ) as llm:
        free = managers(llm)[0].block_pool.get_num_free_blocks()
        clean = run_steps(llm, prompts, params, lambda: None)
        seen = {"steps": 0, "streaming": 0, "retrieval": 0}

        def poison() -> None:
            kept = retained_blocks(llm)
            caches = {cache.data_ptr(): cache for cache in model_runner(llm).kv_caches}
            for cache in caches.values():
                bad = [i for i in range(cache.shape[0]) if i not in kept]
                cache[bad] = float("nan")
            for request in core(llm).scheduler.running:
                n = request.num_computed_tokens
                for blocks in managers(llm):
                    row = blocks.req_to_blocks[request.request_id]
                    live = sum(not block.is_null for block in row)
                    is_streaming = (
                        isinstance(blocks, SinkManager)
                        and blocks.policy.window_size == W
                    )
                    policy = RetentionPolicy(S, W if is_streaming else 1 << 40)
                    if not is_streaming and retrieval_window:
                        policy = RetentionPolicy(S, retrieval_window)
                    assert live <= policy.max_blocks(64, 1024, 32)
                    kind = "streaming" if is_streaming else "retrieval"
                    seen[kind] = max(seen[kind], live)
                    if not is_streaming and not retrieval_window:
                        assert live >= -(-n // 32), "a retrieval head keeps everything"
            seen["steps"] += 1

        assert run_steps(llm, prompts, params, poison) == clean
        assert seen["steps"] > 100
        assert seen["retrieval"] > seen["streaming"], seen
        assert managers(llm)[0].block_pool.get_num_free_blocks() == free
