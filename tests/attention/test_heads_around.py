"""Heads of two policies with everything around them: hits, pressure, drafts, aborts."""

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
from tests.helpers.heads_reference import HeadsReference, random_heads
from vllm_sink.attention import cpu
from vllm_sink.cache.head_caches import HeadCache, HeadGroups
from vllm_sink.policy.grouping import Grouping
from vllm_sink.settings.resolve import resolve
from vllm_sink.start import log_lines

TOLERANCE = 2e-3
S, W, BLOCK = 4, 60, 32
HEADS = random_heads(30)
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
def expected(reference):
    return HeadsReference(reference, HEADS, S, W)


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """What the start said; filled by ``llm``."""
    return []


@pytest.fixture(scope="module")
def llm(model_path, lines):
    """A pool that holds about two of the requests below: 8 x 32 tokens a head."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        say = SimpleNamespace(
            info=lambda text, *args: lines.append(text % args),
            warning=lambda text, *args: lines.append("WARNING " + text % args),
        )
        monkeypatch.setattr(log_lines, "logger", say)
        with sink_engine(
            model_path,
            S,
            W,
            retrieval=dict(heads=HEADS),
            num_gpu_blocks_override=50,
            max_num_seqs=8,
            **SMALL,
        ) as engine:
            yield engine


def test_the_pool_gives_what_the_start_line_says(llm, lines, prose):
    """One line: heads, and MiB of a request; the calculator's arithmetic."""
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

    run_steps(llm, [prose[:600]], greedy(120), look)
    for computed, blocks in held.items():
        if computed > 600:
            # The line counts the next token, and a window at its worst place.
            most = memory.blocks(computed, in_flight_tokens=1)
            assert most - 2 <= blocks <= most, computed
        else:
            assert blocks <= memory.blocks(computed, in_flight_tokens=64)


def test_prefix_hits_are_used_and_exact(llm, prose, expected):
    """A repeat, and a prompt that goes on elsewhere in the middle of the streaming
    heads' gap: the retrieval heads' whole prefix and the others' tail are found."""
    prompt = prose[:600]
    assert llm.reset_prefix_cache()
    first = llm.generate({"prompt_token_ids": prompt}, greedy(8), use_tqdm=False)[0]
    again = llm.generate({"prompt_token_ids": prompt}, greedy(8), use_tqdm=False)[0]
    assert first.num_cached_tokens == 0
    assert again.num_cached_tokens == 576  # whole blocks before the last token
    longer = prompt + prose[9000:9100]
    other = llm.generate({"prompt_token_ids": longer}, greedy(8), use_tqdm=False)[0]
    assert other.num_cached_tokens >= 576
    # Here the streaming heads have nothing left: no hit, not a wrong one.
    early = prompt[:300] + prose[9000:9100]
    parted = llm.generate({"prompt_token_ids": early}, greedy(8), use_tqdm=False)[0]
    assert parted.num_cached_tokens % BLOCK == 0
    for output, tokens in (
        (first, prompt),
        (again, prompt),
        (other, longer),
        (parted, early),
    ):
        check_greedy(expected, tokens, list(output.outputs[0].token_ids))


def test_a_pool_that_runs_dry(llm, prose, expected):
    """Preempted and resumed requests give what they give alone; nothing leaks."""
    assert llm.reset_prefix_cache()
    free = free_blocks(llm)
    prompts = [prose[3000 * i :][: 40 + 12 * i] for i in range(8)]
    preempted = {}

    def look() -> None:
        for request in core(llm).scheduler.requests.values():
            preempted[request.request_id] = request.num_preemptions

    finished = run_steps(llm, prompts, greedy(120), look)
    print(f"{sum(preempted.values())} preemptions")
    assert sum(preempted.values()) > 0
    assert free_blocks(llm) == free
    for index, prompt in enumerate(prompts):
        check_greedy(expected, prompt, finished[str(index)])


def test_abort_and_reset(llm, prose, expected):
    """In prefill and in decode; the request beside it is undisturbed."""
    assert llm.reset_prefix_cache()
    free = free_blocks(llm)
    engine = llm.llm_engine
    for name, length in (("beside", 200), ("decoding", 40), ("prefilling", 700)):
        tokens = prose[length : 2 * length]
        engine.add_request(name, {"prompt_token_ids": tokens}, greedy(60))
    generated, steps = [], 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.request_id == "beside" and output.finished:
                generated = list(output.outputs[0].token_ids)
        steps += 1
        if steps == 8:
            engine.abort_request(["decoding", "prefilling"])
    check_greedy(expected, prose[200:400], generated)
    assert free_blocks(llm) == free
    assert llm.reset_prefix_cache()
    assert free_blocks(llm) == free


def test_ngram_drafts_change_nothing(model_path, prose, expected):
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
        finished = run_steps(llm, prompts, greedy(60), lambda: count.append(1))
    for index, prompt in enumerate(prompts):
        check_greedy(expected, prompt, finished[str(index)])
    prefill = sum(-(-len(prompt) // 64) for prompt in prompts)
    assert len(count) < prefill + 60, "no draft was accepted"


class TestNoticed:
    """Each part, broken, is far from the reference."""

    def error(self, model_path, expected, prose) -> float:
        tokens = prose[:400]
        with sink_engine(model_path, S, W, retrieval=dict(heads=HEADS), **SMALL) as llm:
            got = prompt_logprobs(llm, [tokens])[0]
        difference = (got - expected.logprobs(tokens)).abs()
        return float(difference.nan_to_num(1e9).max())

    def test_the_policy_of_one_head_is_swapped(self, model_path, reference, prose):
        swapped = [list(layer) for layer in HEADS]
        swapped[10][1] = 1 - swapped[10][1]
        wrong = HeadsReference(reference, swapped, S, W)
        assert self.error(model_path, wrong, prose) > 10 * TOLERANCE

    def test_the_table_of_one_group_is_mixed_up(
        self, model_path, expected, prose, monkeypatch
    ):
        real = rows.Tiles._kinds.func

        def mixed(self):
            kinds = real(self)
            kinds[1, rows.TABLE] = kinds[2, rows.TABLE]
            return kinds

        monkeypatch.setattr(rows.Tiles._kinds, "func", mixed)
        assert self.error(model_path, expected, prose) > 10 * TOLERANCE

    def test_the_slots_of_two_groups_are_mixed_up(
        self, model_path, expected, prose, monkeypatch
    ):
        real = rows.Slots.of_kinds

        def mixed(slots):
            return real([slots[0], *reversed(slots[1:])])

        monkeypatch.setattr(cpu.Slots, "of_kinds", mixed)
        assert self.error(model_path, expected, prose) > 10 * TOLERANCE

    def test_one_head_is_in_another_group(
        self, model_path, expected, prose, monkeypatch
    ):
        real = HeadGroups.register

        def register(self, heads):
            group = real(self, heads)
            if group.index == 1:
                chosen = next(h for h in group.heads if type(h) is HeadCache)
                chosen.group = self.groups[0]
            return group

        monkeypatch.setattr(HeadGroups, "register", register)
        assert self.error(model_path, expected, prose) > 10 * TOLERANCE

    def test_the_turn_of_one_group_is_left_out(
        self, model_path, expected, prose, monkeypatch
    ):
        real = rows.Turns._addresses.func

        def without(self):
            addresses = np.array(real(self))
            addresses[1] = 0
            return addresses

        monkeypatch.setattr(rows.Turns._addresses, "func", without)
        assert self.error(model_path, expected, prose) > 10 * TOLERANCE
