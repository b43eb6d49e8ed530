"""A random model in a pool that runs dry: exact results, no leak."""

import random

import pytest
from vllm import SamplingParams

from tests.helpers.engine import core, manager, sink_engine

TOLERANCE = 2e-3  # of a log-probability, float32
BLOCK = 32  # the small engine's: S + W = 64 and steps of 64 tokens
SMALL = dict(
    block_size=BLOCK,
    max_num_batched_tokens=64,
    max_model_len=2048,
    async_scheduling=False,
)
SMALL_BOUND = 1 + 4 + 1  # ceil(4 / 32) + ceil((60 - 1 + 64) / 32) + 1


def chat_lengths(rng: random.Random) -> list[int]:
    """64 prompts of 200 to 6,000 tokens, most of them short, in random order.

    Half of them end a few tokens short of two blocks: their answers need a third.
    """
    lengths = [6000, 2000, 900]
    lengths += [rng.randrange(248, 257) for _ in range(32)]
    lengths += [rng.randrange(200, 248) for _ in range(64 - len(lengths))]
    rng.shuffle(lengths)
    return lengths


def result(output) -> tuple[list[int], list[float]]:
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    chosen = [
        entry[token].logprob
        for entry, token in zip(completion.logprobs, tokens, strict=True)
    ]
    return tokens, chosen


def add(llm, name: str, prompt: list[int], max_tokens: int) -> None:
    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0
    )
    llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)


def drain(llm, on_step=lambda: None) -> dict[str, tuple[list[int], list[float]]]:
    """Step until nothing is left; {request id: (tokens, log-probabilities)}."""
    finished = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                finished[output.request_id] = result(output)
        on_step()
    return finished


def preemptions(llm) -> dict[str, int]:
    """Preemptions of each request that is alive."""
    return {
        name.rsplit("-", 1)[0]: request.num_preemptions
        for name, request in core(llm).scheduler.requests.items()
    }


def free_blocks(llm) -> int:
    return manager(llm).block_pool.get_num_free_blocks()


def check_same(got, want) -> None:
    assert got[0] == want[0]
    assert max(abs(a - b) for a, b in zip(got[1], want[1], strict=True)) < TOLERANCE


def test_64_chats_in_a_few_dozen_blocks(tiny_path, tiny_text):
    """Preempted, resumed and hit prefixes: each result is that of a solo run."""
    rng = random.Random(5)
    system = tiny_text[:140]  # a system prompt that all share: more than a block
    prompts = {}
    for index, length in enumerate(chat_lengths(rng)):
        start = 1000 + 700 * index
        prompts[str(index)] = system + tiny_text[start : start + length - len(system)]
    aborted = {f"aborted{i}": tiny_text[60_000 + i :][: 120 + 60 * i] for i in range(6)}
    settings = dict(
        max_num_batched_tokens=512,
        max_num_seqs=64,
        max_model_len=6144,
        async_scheduling=False,
    )
    with sink_engine(tiny_path, 4, 508, num_gpu_blocks_override=25, **settings) as llm:
        free = free_blocks(llm)
        preempted: dict[str, int] = {}
        steps = 0
        for name, prompt in prompts.items():
            add(llm, name, prompt, 12)
        for name, prompt in aborted.items():
            add(llm, name, prompt, 1000)

        def on_step() -> None:
            nonlocal steps
            steps += 1
            preempted.update(preemptions(llm))
            if steps % 8 == 0 and steps // 8 <= len(aborted):
                llm.llm_engine.abort_request([f"aborted{steps // 8 - 1}"])

        together = drain(llm, on_step)
        assert together.keys() == prompts.keys()
        assert free_blocks(llm) == free, "blocks leaked"
        forced = sum(preempted.values())
        print(f"{steps} steps, {forced} preemptions")
        assert forced > 0
        assert llm.reset_prefix_cache()
        assert free_blocks(llm) == free
    with sink_engine(tiny_path, 4, 508, enable_prefix_caching=False, **settings) as llm:
        for name, prompt in prompts.items():
            add(llm, name, prompt, 12)
            check_same(together[name], drain(llm)[name])


@pytest.fixture(scope="module")
def small(tiny_path):
    """An engine whose pool holds exactly one request's bound."""
    with sink_engine(
        tiny_path, 4, 60, num_gpu_blocks_override=SMALL_BOUND + 1, **SMALL
    ) as llm:
        yield llm


def test_pool_of_one_request(small, tiny_reference, tiny_text):
    """Requests longer than the pool complete, one after another."""
    assert manager(small).max_admission_blocks_per_request == SMALL_BOUND
    assert free_blocks(small) == SMALL_BOUND
    prompts = {
        str(i): tiny_text[9000 * i :][:length] for i, length in enumerate([700, 300])
    }
    for name, prompt in prompts.items():
        add(small, name, prompt, 24)
    finished = drain(small)
    assert free_blocks(small) == SMALL_BOUND
    for name, prompt in prompts.items():
        tokens = finished[name][0]
        logits = tiny_reference.logits(prompt + tokens, 4, 60)[len(prompt) - 1 : -1]
        assert tokens == logits.argmax(-1).tolist()


def state_of(llm, name: str) -> str:
    for full_name, request in core(llm).scheduler.requests.items():
        if full_name.startswith(name):
            prefill = request.num_computed_tokens < request.num_prompt_tokens
            status = request.status.name
            return f"{status} prefill" if status == "RUNNING" and prefill else status
    return "gone"


@pytest.mark.parametrize(
    "state", ["WAITING", "RUNNING prefill", "RUNNING", "PREEMPTED", "gone"]
)
def test_abort_in_every_state(small, tiny_text, state):
    """The pool is whole after it, and the request beside it is undisturbed."""
    add(small, "beside", tiny_text[:40], 40)
    want = drain(small)["beside"]
    assert small.reset_prefix_cache()
    # Room for the sinks and 127 tokens of both: the younger is preempted.
    add(small, "beside", tiny_text[:40], 40)
    add(
        small,
        "victim",
        tiny_text[5000 : 5000 + (200 if "prefill" in state else 60)],
        40,
    )
    seen = []
    finished = {}
    while small.llm_engine.has_unfinished_requests():
        if state_of(small, "victim") == state or (not seen and state == "WAITING"):
            small.llm_engine.abort_request(["victim"])
            seen.append(state)
        for output in small.llm_engine.step():
            if output.finished:
                finished[output.request_id] = result(output)
    if state == "gone":
        small.llm_engine.abort_request(["victim"])
        seen.append(state)
    assert seen, f"the request was never {state}"
    check_same(finished["beside"], want)
    assert free_blocks(small) == SMALL_BOUND
    assert small.reset_prefix_cache()
