"""The real model under the policy equals the dense-mask reference."""

from dataclasses import replace

import pytest
import torch
from vllm import SamplingParams
from vllm_sink_kernels.cpu import attention

from tests.helpers.engine import (
    manager,
    model_runner,
    prompt_logprobs,
    run_steps,
    sink_engine,
)
from vllm_sink.cache.block_manager import SinkManager
from vllm_sink.policy.layout import RetentionPolicy, cdiv
from vllm_sink.rotation.table import RotaryTable

TOLERANCE = 2e-3  # log-probability, float32 (the bound)


@pytest.mark.parametrize(
    "sinks, window, block_size, chunk, positions",
    [
        (4, 60, 32, 64, "cache"),
        (4, 60, 128, 64, "absolute"),
        (130, 126, 128, 2048, "cache"),
    ],
)
def test_logprobs_equal_reference(
    model_path, reference, prose, sinks, window, block_size, chunk, positions
):
    prompts = [prose[:700], prose[5000:5257], prose[9000:9003], prose[20000:20129]]
    case = sinks, window, block_size, chunk, positions
    check_equals_reference(model_path, reference, prompts, *case)


@pytest.mark.parametrize(
    "sinks, window, block_size, chunk, positions",
    [
        (16, 112, 128, 64, "cache"),
        (16, 112, 32, 2048, "absolute"),
        (1, 1, 32, 64, "cache"),
        (1, 1, 128, 2048, "cache"),
        (0, 64, 32, 2048, "cache"),
        (130, 126, 32, 64, "cache"),
    ],
)
def test_logprobs_of_a_random_model(
    tiny_path, tiny_reference, tiny_text, sinks, window, block_size, chunk, positions
):
    prompts = [tiny_text[:700], tiny_text[700:957], tiny_text[:3], tiny_text[200:329]]
    case = sinks, window, block_size, chunk, positions
    check_equals_reference(tiny_path, tiny_reference, prompts, *case)


def check_equals_reference(
    path, reference, prompts, sinks, window, block_size, chunk, positions
):
    """Mixed lengths at once, in chunks, over blocks: one answer."""
    with sink_engine(
        path,
        sinks,
        window,
        positions=positions,
        block_size=block_size,
        max_num_batched_tokens=chunk,
        max_num_seqs=4,
        max_model_len=1024,
    ) as llm:
        measured = prompt_logprobs(llm, prompts)
    for tokens, got in zip(prompts, measured, strict=True):
        want = reference.logprobs(tokens, sinks, window, positions)
        assert (got - want).abs().max() < TOLERANCE
    dense = reference.logprobs(prompts[0], 0, 4096)
    assert (measured[0] - dense).abs().max() > 0.1, "the policy must be visible"


def test_generated_tokens_are_the_references_greedy_choice(
    model_path, reference, prose
):
    """100 tokens each of two requests that started at different lengths.

    By induction: if each token is the reference's argmax after the tokens
    before it, the sequence is the reference's greedy decoding.
    """
    prompts = [prose[300:500], prose[3000:3017]]
    with sink_engine(model_path, 4, 60, max_model_len=1024) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": tokens} for tokens in prompts],
            SamplingParams(temperature=0, max_tokens=100, ignore_eos=True),
            use_tqdm=False,
        )
    for tokens, output in zip(prompts, outputs, strict=True):
        generated = list(output.outputs[0].token_ids)
        assert len(generated) == 100
        logits = reference.logits(tokens + generated, 4, 60)
        choice = logits[len(tokens) - 1 : -1].argmax(-1).tolist()
        assert generated == choice


def test_budget_above_length_is_full_attention(tiny_path, tiny_text):
    """S + W >= max_model_len reproduces stock CPU attention."""
    prompts = [tiny_text[:600], tiny_text[300:400]]
    with sink_engine(tiny_path, max_model_len=1024) as llm:
        stock = prompt_logprobs(llm, prompts)
    with sink_engine(tiny_path, 4, 1020, max_model_len=1024) as llm:
        sink = prompt_logprobs(llm, prompts)
    for want, got in zip(stock, sink, strict=True):
        assert (got - want).abs().max() < TOLERANCE


def test_bfloat16_follows_float32(model_path, reference, prose):
    """bf16 rounds; the policy stays the same (mean error far below its effect)."""
    tokens = prose[:400]
    exact = reference.logprobs(tokens, 4, 60)
    with sink_engine(model_path, 4, 60, max_model_len=512, dtype="bfloat16") as llm:
        assert model_runner(llm).dtype == torch.bfloat16
        rounded = prompt_logprobs(llm, [tokens])[0]
    dense = reference.logprobs(tokens, 0, 4096)
    error = (rounded - exact).abs().mean()
    assert error < 0.25 * (dense - exact).abs().mean()


def retained_blocks(llm) -> set[int]:
    """Ids of the blocks that DESIGN 2.4 lets the next queries read."""
    blocks = manager(llm)
    policy, size = blocks.policy, blocks.block_size
    kept = set()
    for request in model_requests(llm):
        n = request.num_computed_tokens
        row = blocks.req_to_blocks[request.request_id]
        for index, block in enumerate(row):
            tokens = range(index * size, min((index + 1) * size, n))
            if any(policy.sees(n, token) for token in tokens):
                kept.add(block.block_id)
    return kept


def model_requests(llm):
    return list(llm.llm_engine.engine_core.engine_core.scheduler.running)


def test_nothing_outside_the_policy_is_read(tiny_path, tiny_text):
    """Blocks outside the retained set hold NaN after each step: no effect."""
    prompts = [tiny_text[:700], tiny_text[700:790]]
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    settings = dict(
        max_num_batched_tokens=64,
        max_num_seqs=2,
        block_size=32,
        enable_prefix_caching=False,
        async_scheduling=False,
        max_model_len=1024,
        num_gpu_blocks_override=40,
    )
    with sink_engine(tiny_path, 4, 60, **settings) as llm:
        clean = run_steps(llm, prompts, params, lambda: None)
        poisoned_steps = 0

        def poison() -> None:
            nonlocal poisoned_steps
            kept = retained_blocks(llm)
            for cache in model_runner(llm).kv_caches:
                bad = [i for i in range(cache.shape[0]) if i not in kept]
                cache[bad] = float("nan")
            poisoned_steps += 1

        assert run_steps(llm, prompts, params, poison) == clean
        assert poisoned_steps > 100


def watch_bound(llm, prompts, max_batched) -> None:
    """Run to the end; check DESIGN 2.4's bound and the sinks' ids each step."""
    blocks = manager(llm)
    policy, size = blocks.policy, blocks.block_size
    bound = (
        cdiv(policy.num_sink_tokens, size)
        + cdiv(policy.window_size - 1 + max_batched, size)
        + 1
    )
    sinks: dict[str, list[int]] = {}
    most = 0

    def check() -> None:
        nonlocal most
        for request in model_requests(llm):
            row = blocks.req_to_blocks[request.request_id]
            live = [block for block in row if not block.is_null]
            assert len(live) <= bound, "more blocks than the policy allows"
            most = max(most, len(row))
            ids = [b.block_id for b in row[: policy.num_sink_blocks(size)]]
            assert sinks.setdefault(request.request_id, ids) == ids
            assert 0 not in ids, "a sink block was freed"

    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    free = blocks.block_pool.get_num_free_blocks()
    run_steps(llm, prompts, params, check)
    assert most > bound, "the requests must outgrow the bound"
    assert blocks.block_pool.get_num_free_blocks() == free


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_live_blocks_stay_within_the_bound(tiny_path, tiny_text, prefix_caching):
    with sink_engine(
        tiny_path,
        4,
        60,
        block_size=32,
        max_num_batched_tokens=64,
        max_num_seqs=2,
        max_model_len=1024,
        async_scheduling=False,
        enable_prefix_caching=prefix_caching,
    ) as llm:
        watch_bound(llm, [tiny_text[:900], tiny_text[:700]], 64)


def test_million_token_context_starts_in_a_small_pool(tiny_path):
    """Dense attention would need 7,813 blocks a request; the pool has fewer."""
    with sink_engine(
        tiny_path,
        4,
        1020,
        max_model_len=1_000_000,
        max_num_batched_tokens=1024,
        hf_overrides={"max_position_embeddings": 1_000_000},
    ) as llm:
        blocks = manager(llm)
        assert blocks.block_pool.num_gpu_blocks < 1_000_000 // blocks.block_size
        assert blocks.max_admission_blocks_per_request == 1 + 16 + 1


def test_prefix_hits_change_nothing(tiny_path, tiny_reference, tiny_text):
    """Three turns of a growing history: hits happen, tokens stay exact."""
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    history = tiny_text[:600]
    with sink_engine(tiny_path, 4, 60, block_size=32, max_model_len=1024) as llm:
        for turn in range(3):
            output = llm.generate(
                [{"prompt_token_ids": history}], params, use_tqdm=False
            )[0]
            if turn:
                # The last block before the new text is the longest hit.
                assert output.num_cached_tokens >= len(history) - 50 - 2 * 32
            generated = list(output.outputs[0].token_ids)
            logits = tiny_reference.logits(history + generated, 4, 60)
            assert generated == logits[len(history) - 1 : -1].argmax(-1).tolist()
            history = history + generated + tiny_text[900 + turn : 918 + turn]


def test_far_past_the_trained_length(model_path, prose):
    """16,384 tokens, twice the trained length: perplexity does not rise."""
    tokens = prose[:16_384]
    with sink_engine(
        model_path,
        4,
        1020,
        max_model_len=16_400,
        hf_overrides={"max_position_embeddings": 16_400},
        max_num_batched_tokens=2048,
    ) as llm:
        logprobs = prompt_logprobs(llm, [tokens])[0]
    early = (-logprobs[4096:8192].mean()).exp()
    late = (-logprobs[-4096:].mean()).exp()
    print(f"perplexity: tokens 4,096-8,192 {early:.3f}, last 4,096 {late:.3f}")
    assert abs(late / early - 1) < 0.1


class TestDisabled:
    """Each part of the policy, switched off, is noticed."""

    def error(self, tiny_path, tiny_reference, tokens) -> float:
        with sink_engine(tiny_path, 4, 60, max_model_len=1024) as llm:
            got = prompt_logprobs(llm, [tokens])[0]
        want = tiny_reference.logprobs(tokens, 4, 60)
        return float((got - want).abs().max())

    def test_mask(self, tiny_path, tiny_reference, tiny_text, monkeypatch):
        real = attention.plan

        def causal_only(kinds, *args, **kwargs):
            kinds = [replace(kind, window_size=1 << 40) for kind in kinds]
            return real(kinds, *args, **kwargs)

        monkeypatch.setattr(attention, "plan", causal_only)
        assert self.error(tiny_path, tiny_reference, tiny_text[:400]) > 10 * TOLERANCE

    def test_turn(self, tiny_path, tiny_reference, tiny_text, monkeypatch):
        def no_turn(self, positions, budget):
            shape = (len(positions), self.rotary_dim // 2)
            return torch.ones(shape), torch.zeros(shape)

        monkeypatch.setattr(RotaryTable, "turn", no_turn)
        assert self.error(tiny_path, tiny_reference, tiny_text[:400]) > 10 * TOLERANCE

    def test_eviction(self, tiny_path, tiny_text, monkeypatch):
        monkeypatch.setattr(SinkManager, "remove_skipped_blocks", lambda *_: None)
        with (
            sink_engine(
                tiny_path,
                4,
                60,
                block_size=32,
                max_num_batched_tokens=64,
                max_model_len=1024,
                max_num_seqs=2,
                async_scheduling=False,
            ) as llm,
            pytest.raises(AssertionError, match="more blocks than"),
        ):
            watch_bound(llm, [tiny_text[:900]], 64)

    def test_sink_retention(self, tiny_path, tiny_text, monkeypatch):
        def from_the_head(self, num_tokens, block_size):
            return 0, self.window_start(num_tokens) // block_size

        monkeypatch.setattr(RetentionPolicy, "gap_blocks", from_the_head)
        with (
            sink_engine(
                tiny_path,
                4,
                60,
                block_size=32,
                max_num_batched_tokens=64,
                max_model_len=1024,
                async_scheduling=False,
            ) as llm,
            pytest.raises(AssertionError),
        ):
            watch_bound(llm, [tiny_text[:900]], 64)
