"""Heads of two policies under prefix hits, pressure, drafts and aborts."""

from types import SimpleNamespace

import numpy as np
import pytest
from vllm import SamplingParams
from vllm_sink_kernels.cpu import rows

from tests.helpers.engine import (
    core,
    managers,
    model_runner,
    prompt_logprobs,
    run_steps,
    sink_engine,
)
from tests.helpers.reference import HeadsReference, random_heads
from vllm_sink.attention import cpu
from vllm_sink.cache.head_caches import HeadCache, HeadGroups
from vllm_sink.policy.grouping import Grouping
from vllm_sink.settings.resolve import resolve
from vllm_sink.start import log_lines

TOLERANCE = 2e-3
S, W, BLOCK = 4, 60, 32
HEADS = random_heads(30)
TINY_HEADS = [[1, 0], [0, 1], [0, 0]]
SMALL = dict(
    block_size=BLOCK,
    max_num_batched_tokens=64,
    max_model_len=1024,
    async_scheduling=False,
)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def free_blocks(llm) -> int:
    return managers(llm)[0].block_pool.get_num_free_blocks()


def check_greedy(expected, prompt, generated) -> None:
    logits = expected.logits(prompt + generated)[len(prompt) - 1 : -1]
    assert generated == logits.argmax(-1).tolist()


@pytest.fixture(scope="module")
def tiny_expected(tiny_reference):
    return HeadsReference(tiny_reference, TINY_HEADS, S, W)


# Holds about two of the requests below: 8 x 32 tokens a head.
POOL = dict(num_gpu_blocks_override=50, max_num_seqs=8, **SMALL)


@pytest.fixture(scope="module")
def llm(tiny_path):
    retrieval = dict(heads=TINY_HEADS)
    with sink_engine(tiny_path, S, W, retrieval=retrieval, **POOL) as engine:
        assert len(managers(engine)) == 3
        yield engine


def test_the_pool_gives_what_the_start_line_says(model_path, prose, monkeypatch):
    """One line: heads, and MiB of a request; the calculator's arithmetic."""
    lines: list[str] = []
    say = SimpleNamespace(
        info=lambda text, *args: lines.append(text % args),
        warning=lambda text, *args: lines.append("WARNING " + text % args),
    )
    monkeypatch.setattr(log_lines, "logger", say)
    retrieval = dict(heads=HEADS)
    with sink_engine(model_path, S, W, retrieval=retrieval, **POOL) as llm:
        check_the_pool(llm, lines, prose)


def check_the_pool(llm, lines, prose) -> None:
    config = model_runner(llm).vllm_config
    settings = resolve(config)
    page = 2 * BLOCK * 64 * 4  # K and V of a block in one head, float32
    memory = log_lines.request_memory(config, settings, page)
    assert memory.grouping == Grouping(30, 1, 2)
    assert memory.pool_block_bytes == 30 * page
    assert lines == [
        "Retrieval heads: 30 of 90 KV heads keep everything, the others 4 + 60; a "
        f"request holds {memory.bytes(1024) / 2**20:.1f} MiB at 1,024 tokens (dense "
        "45.0) on this worker, in 3 groups."
    ]
    assert llm.reset_prefix_cache()
    free, held = free_blocks(llm), {}

    def look() -> None:
        for request in core(llm).scheduler.running:
            held[request.num_computed_tokens] = free - free_blocks(llm)

    run_steps(llm, [prose[:600]], greedy(60), look)
    for computed, blocks in held.items():
        if computed > 600:
            # The line counts the next token, and a window at its worst place.
            most = memory.blocks(computed, in_flight_tokens=1)
            assert most - 2 <= blocks <= most, computed
        else:
            assert blocks <= memory.blocks(computed, in_flight_tokens=64)


def test_ngram_drafts_change_nothing(model_path, reference, prose):
    expected = HeadsReference(reference, HEADS, S, W)
    prompts = [prose[300:420] * 3, prose[2000:2300]]
    count = []
    drafts = dict(method="ngram", num_speculative_tokens=5)
    drafts |= dict(prompt_lookup_min=2, prompt_lookup_max=4)
    with sink_engine(
        model_path,
        S,
        W,
        retrieval=dict(heads=HEADS),
        speculative_config=drafts,
        **SMALL,
    ) as llm:
        finished = run_steps(llm, prompts, greedy(40), lambda: count.append(1))
    for index, prompt in enumerate(prompts):
        check_greedy(expected, prompt, finished[str(index)])
    prefill = sum(-(-len(prompt) // 64) for prompt in prompts)
    assert len(count) < prefill + 40, "no draft was accepted"


def test_prefix_hits_are_used_and_exact(llm, tiny_text, tiny_expected):
    """A repeat, and a prompt that goes on elsewhere in the middle of the streaming
    heads' gap: the retrieval heads' whole prefix and the others' tail are found."""
    prompt = tiny_text[:600]
    assert llm.reset_prefix_cache()
    first = llm.generate({"prompt_token_ids": prompt}, greedy(8), use_tqdm=False)[0]
    again = llm.generate({"prompt_token_ids": prompt}, greedy(8), use_tqdm=False)[0]
    assert first.num_cached_tokens == 0
    assert again.num_cached_tokens == 576  # whole blocks before the last token
    longer = prompt + tiny_text[9000:9100]
    other = llm.generate({"prompt_token_ids": longer}, greedy(8), use_tqdm=False)[0]
    assert other.num_cached_tokens >= 576
    # Here the streaming heads have nothing left: no hit, not a wrong one.
    early = prompt[:300] + tiny_text[9000:9100]
    parted = llm.generate({"prompt_token_ids": early}, greedy(8), use_tqdm=False)[0]
    assert parted.num_cached_tokens % BLOCK == 0
    for output, tokens in (
        (first, prompt),
        (again, prompt),
        (other, longer),
        (parted, early),
    ):
        check_greedy(tiny_expected, tokens, list(output.outputs[0].token_ids))


def test_a_pool_that_runs_dry(llm, tiny_text, tiny_expected):
    """Preempted and resumed requests give what they give alone; nothing leaks."""
    assert llm.reset_prefix_cache()
    free = free_blocks(llm)
    prompts = [tiny_text[3000 * i :][: 40 + 12 * i] for i in range(8)]
    preempted = {}

    def look() -> None:
        for request in core(llm).scheduler.requests.values():
            preempted[request.request_id] = request.num_preemptions

    finished = run_steps(llm, prompts, greedy(120), look)
    print(f"{sum(preempted.values())} preemptions")
    assert sum(preempted.values()) > 0
    assert free_blocks(llm) == free
    for index, prompt in enumerate(prompts):
        check_greedy(tiny_expected, prompt, finished[str(index)])


def test_abort_and_reset(llm, tiny_text, tiny_expected):
    """In prefill and in decode; the request beside it is undisturbed."""
    assert llm.reset_prefix_cache()
    free = free_blocks(llm)
    engine = llm.llm_engine
    for name, length in (("beside", 200), ("decoding", 40), ("prefilling", 700)):
        tokens = tiny_text[length : 2 * length]
        engine.add_request(name, {"prompt_token_ids": tokens}, greedy(60))
    generated, steps = [], 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.request_id == "beside" and output.finished:
                generated = list(output.outputs[0].token_ids)
        steps += 1
        if steps == 8:
            engine.abort_request(["decoding", "prefilling"])
    check_greedy(tiny_expected, tiny_text[200:400], generated)
    assert free_blocks(llm) == free
    assert llm.reset_prefix_cache()
    assert free_blocks(llm) == free


class TestNoticed:
    """Each part, broken, is far from the reference."""

    def error(self, tiny_path, tiny_expected, tiny_text) -> float:
        tokens = tiny_text[:400]
        with sink_engine(
            tiny_path, S, W, retrieval=dict(heads=TINY_HEADS), **SMALL
        ) as llm:
            got = prompt_logprobs(llm, [tokens])[0]
        difference = (got - tiny_expected.logprobs(tokens)).abs()
        return float(difference.nan_to_num(1e9).max())

    def test_the_policy_of_one_head_is_swapped(
        self, tiny_path, tiny_reference, tiny_text
    ):
        swapped = [list(layer) for layer in TINY_HEADS]
        swapped[1][1] = 1 - swapped[1][1]
        wrong = HeadsReference(tiny_reference, swapped, S, W)
        assert self.error(tiny_path, wrong, tiny_text) > 10 * TOLERANCE

    def test_the_table_of_one_group_is_mixed_up(
        self, tiny_path, tiny_expected, tiny_text, monkeypatch
    ):
        real = rows.Tiles._kinds.func

        def mixed(self):
            kinds = real(self)
            kinds[1, rows.TABLE] = kinds[2, rows.TABLE]
            return kinds

        monkeypatch.setattr(rows.Tiles._kinds, "func", mixed)
        assert self.error(tiny_path, tiny_expected, tiny_text) > 10 * TOLERANCE

    def test_the_slots_of_two_groups_are_mixed_up(
        self, tiny_path, tiny_expected, tiny_text, monkeypatch
    ):
        real = rows.Slots.of_kinds

        def mixed(slots):
            return real([slots[0], *reversed(slots[1:])])

        monkeypatch.setattr(cpu.Slots, "of_kinds", mixed)
        assert self.error(tiny_path, tiny_expected, tiny_text) > 10 * TOLERANCE

    def test_one_head_is_in_another_group(
        self, tiny_path, tiny_expected, tiny_text, monkeypatch
    ):
        real = HeadGroups.register

        def register(self, heads):
            group = real(self, heads)
            if group.index == 1:
                chosen = next(h for h in group.heads if type(h) is HeadCache)
                chosen.group = self.groups[0]
            return group

        monkeypatch.setattr(HeadGroups, "register", register)
        assert self.error(tiny_path, tiny_expected, tiny_text) > 10 * TOLERANCE

    def test_the_turn_of_one_group_is_left_out(
        self, tiny_path, tiny_expected, tiny_text, monkeypatch
    ):
        real = rows.Turns._addresses.func

        def without(self):
            addresses = np.array(real(self))
            addresses[1] = 0
            return addresses

        monkeypatch.setattr(rows.Turns._addresses, "func", without)
        assert self.error(tiny_path, tiny_expected, tiny_text) > 10 * TOLERANCE
