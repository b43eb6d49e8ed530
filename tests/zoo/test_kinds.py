"""Heads of two policies in models of every other kind: hits, preemption, several maps.

Gemma 3 stands for them in ``tests/attention/test_heads_beside.py``;
``VLLM_SINK_WHOLE_ZOO=1 pytest tests/zoo/test_kinds.py`` runs the rest.
"""

import os
from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.attention.test_heads_beside import (
    OWN,
    SETTINGS,
    TOLERANCE,
    S,
    W,
    generate,
    random_tokens,
)
from tests.helpers.engine import (
    core,
    managers,
    output_logprobs,
    prompt_logprobs,
    sink_engine,
)
from tests.helpers.reference import load, logprobs
from tests.zoo.models import entry_of, save

# Two maps of each; the rows of layers that the policy doesn't govern are ignored.
OTHERS = {
    "gpt-oss": ([OWN, [1, 0], OWN, [0, 1]], [OWN, [1, 1], OWN, [0, 1]]),
    # The last two layers read the keys of the first two.
    "Gemma 4, shared keys": ([OWN, [1, 0]] * 2, [OWN, [0, 1]] * 2),
    "Falcon-H1": ([[1, 0], [0, 1]] * 2, [[1, 1], [0, 0], [0, 1], [0, 0]]),
    "Nemotron-H": ([OWN, [1, 0], OWN], [OWN, [0, 1], OWN]),
    "Qwen3-Next": (
        [OWN * 2, [1, 0, 0, 0], OWN * 2, [0, 1, 1, 0]],
        [OWN * 2, [0, 0, 0, 1], OWN * 2, [0, 0, 0, 0]],
    ),
}
# Without prefix hits: vLLM's Mamba 2 fails with them on CPUs, stock too; Qwen3-Next's
# states are not tried with them.
UNCACHED = {"Falcon-H1", "Nemotron-H", "Qwen3-Next"}
LENGTH, POOL = 512, 160
# So that a page, which is as large as a state, holds few tokens.
SMALL_STATES = {
    "Qwen3-Next": {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "head_dim": 256,
    }
}


class Reference:
    """The log-probabilities of a model of the zoo, and how near is near enough.

    In float32 within the tolerance. vLLM runs Qwen3-Next in bfloat16 alone: there the
    mean error counts, against that of the same engine where nothing is evicted.
    """

    def __init__(self, entry, path: str) -> None:
        self.entry, self.model = entry, load(path, auto=entry.auto)
        self.is_rounded = entry.settings.get("dtype") == "bfloat16"
        self.rounding = 0.0
        if self.is_rounded:
            self.model = self.model.to(torch.bfloat16).float()

    def scores(self, tokens, rows=None, window=W, count=None) -> torch.Tensor:
        """Of all tokens but the first, or of the last so many."""
        found = logprobs(
            self.model,
            tokens,
            S,
            window,
            "cache",
            heads=rows,
            extra_window=self.entry.extra_window,
        )
        return found[-(count or len(found)) :]

    def is_near(self, got: torch.Tensor, want: torch.Tensor, times: float = 1) -> bool:
        error = (got - want).abs()
        if self.is_rounded:
            return bool(error.mean() < 1.5 * times * self.rounding)
        return bool(error.max() < times * TOLERANCE)

    def check_reply(self, output, rows) -> list[int]:
        """Returns the prompt and the reply."""
        reply = list(output.outputs[0].token_ids)
        tokens = [*output.prompt_token_ids, *reply]
        want = self.scores(tokens, rows, count=len(reply))
        # The mean of a few tokens varies.
        assert self.is_near(output_logprobs(output), want, 1 + self.is_rounded)
        return tokens


@pytest.mark.skipif(
    not os.environ.get("VLLM_SINK_WHOLE_ZOO"), reason="VLLM_SINK_WHOLE_ZOO runs it"
)
@pytest.mark.parametrize(
    "is_other, workers",
    [(False, 1), (True, 1), (False, 2)],
    ids=["one map", "another", "two workers"],
)
@pytest.mark.parametrize("name", OTHERS)
def test_chunks_hits_and_preemption(name, is_other, workers, tmp_path, monkeypatch):
    """Each map is told from the other one; two workers hold other heads each."""
    entry = entry_of(name)
    entry = replace(entry, config=entry.config | SMALL_STATES.get(name, {}))
    path = save(entry, tmp_path)
    reference = Reference(entry, path)
    settings = {
        **SETTINGS,
        "max_model_len": LENGTH,
        "num_gpu_blocks_override": POOL,
        "max_num_seqs": 6,
        "enable_prefix_caching": name not in UNCACHED,
        **entry.settings,
    }
    prompt = random_tokens(1, 300)
    if reference.is_rounded:
        with sink_engine(path, S, LENGTH - S, **settings) as llm:
            (got,) = prompt_logprobs(llm, [prompt])
        want = reference.scores(prompt, window=LENGTH - S)
        reference.rounding = (got - want).abs().mean()
    if workers > 1:
        settings["tensor_parallel_size"] = workers
        settings["distributed_executor_backend"] = "mp"
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    rows, other = OTHERS[name][::-1] if is_other else OTHERS[name]
    with sink_engine(path, S, W, retrieval=dict(heads=rows), **settings) as llm:
        pool, scheduler = managers(llm)[0].block_pool, core(llm).scheduler
        given, free, preempted = Counter(), [], set()
        take, preempt = pool.get_new_blocks, scheduler._preempt_request

        def count_blocks(count: int):
            blocks = take(count)
            given.update(block.block_id for block in blocks)
            free.append(pool.get_num_free_blocks())
            return blocks

        pool.get_new_blocks = count_blocks
        scheduler._preempt_request = lambda request, *args, **kwargs: (
            preempted.add(request.request_id) or preempt(request, *args, **kwargs)
        )
        (got,) = prompt_logprobs(llm, [prompt])
        assert reference.is_near(got, reference.scores(prompt, rows))
        times = 1 if reference.is_rounded else 20
        assert not reference.is_near(got, reference.scores(prompt, other), times)
        (first,) = generate(llm, [prompt])
        history = reference.check_reply(first, rows) + random_tokens(2, 9)
        (second,) = generate(llm, [history])
        reference.check_reply(second, rows)
        assert second.num_cached_tokens >= 192 or name in UNCACHED
        # Six more at once, in fewer and fewer blocks, until some are preempted.
        peak = POOL - 1 - min(free)
        for left in range(min(3 * peak, POOL - 1), peak, -max(peak // 8, 1)):
            assert llm.reset_prefix_cache()
            held = take(pool.get_num_free_blocks() - left)
            crowd = [random_tokens(left + i, 200) for i in range(6)]
            for output in generate(llm, crowd, max_tokens=100):
                reference.check_reply(output, rows)
            pool.free_blocks(held)
            if preempted:
                break
        assert preempted and max(given.values()) > 1, "what was freed is used again"
        assert pool.get_num_free_blocks() == POOL - 1
