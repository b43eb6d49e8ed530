"""Engines on either model runner, and their replies."""

import contextlib
import os
from dataclasses import dataclass

import torch

SINKS, WINDOW = 4, 20
BLOCK = 16
VOCABULARY = 128
TOLERANCE = 1e-4


def random_tokens(seed: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()


# Prefilled in chunks of 40 tokens, one beside another's decode. The first leaves S + W
# with the last of its reply of 5 tokens: every step more is one more to interpret.
PROMPTS = [random_tokens(i, n) for i, n in enumerate((20, 66, 100))]
FOLLOW_UP = random_tokens(9, 13)
# A model of which a program of a kernel has little to interpret.
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}


@dataclass
class Reply:
    """One request's outcome.

    Args:
        tokens: The generated ones.
        logprobs: Of each generated token; before them, if they were asked for, of
            each prompt token after the first.
        cached: Prompt tokens that the prefix cache held.
    """

    tokens: list[int]
    logprobs: torch.Tensor
    cached: int


@contextlib.contextmanager
def serving(model: str, runner: str, *, policy: dict | None = None, **settings):
    """An engine on runner "v1" (the CPU path) or "v2" (the GPU path, interpreted).

    V2 is what vLLM chooses where nothing is said: nothing is said.

    Args:
        policy: More of the ``sink`` section.
    """
    from tests.helpers.engine import model_runner, sink_engine

    section = {
        "num_sink_tokens": SINKS,
        "window_size": WINDOW,
        "triton_interpreter": runner == "v2",
        **(policy or {}),
    }
    defaults = {
        "attention_backend": "sink",
        "additional_config": {"sink": section},
        "block_size": BLOCK,
        "num_gpu_blocks_override": 200,  # of the GiB that would be zeroed
        "max_model_len": 256,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 40,
        "skip_tokenizer_init": True,
    }
    os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)
    if runner == "v1":
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    try:
        with sink_engine(model, **(defaults | settings)) as llm:
            module = type(model_runner(llm)).__module__
            home = {"v1": "vllm.v1.worker.cpu_model_runner"}
            home["v2"] = "vllm.v1.worker.cpu.model_runner"
            assert module == home[runner], module
            yield llm
    finally:
        os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)


def ask(llm, prompts, max_tokens: int = 5, *, score_prompts: bool = False):
    """Generate greedily; a :class:`Reply` for each prompt.

    Raises:
        AssertionError: A request held more blocks than the policy allows.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        prompt_logprobs=0 if score_prompts else None,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    engine = llm.llm_engine
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
    outputs = {}
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step()}
        check_live_blocks(llm)
    return [reply(outputs[str(i)]) for i in range(len(prompts))]


def first_turn(llm) -> list[Reply]:
    assert llm.reset_prefix_cache()
    return ask(llm, PROMPTS)


def second_turn(llm, first: list[Reply]) -> list[Reply]:
    """The cache holds the first turn, but for the gap: null blocks in the row."""
    prompts = [
        prompt + reply.tokens + FOLLOW_UP
        for prompt, reply in zip(PROMPTS, first, strict=True)
    ]
    return ask(llm, prompts[1:])


def scored(llm) -> list[Reply]:
    return ask(llm, PROMPTS[1:2], score_prompts=True)


def reply(output) -> Reply:
    from tests.helpers.engine import output_logprobs

    tokens = list(output.outputs[0].token_ids)
    return Reply(tokens, output_logprobs(output), output.num_cached_tokens)


def check_live_blocks(llm) -> None:
    """No request holds more blocks under the policy than DESIGN's bound."""
    from tests.helpers.engine import core
    from vllm_sink.cache.block_manager import SinkManager

    config = core(llm).vllm_config
    managers = core(llm).scheduler.kv_cache_manager.coordinator.single_type_managers
    managers = [m for m in managers if isinstance(m, SinkManager)]
    assert managers, "the policy must have reached a layer"
    for manager in managers:
        most = manager.policy.max_blocks(
            config.max_in_flight_tokens,
            config.model_config.max_model_len,
            manager.block_size,
        )
        for name, blocks in manager.req_to_blocks.items():
            live = sum(not block.is_null for block in blocks)
            assert live <= most, f"request {name} holds {live} blocks of {most}"


def assert_same(got: list[Reply], want: list[Reply]) -> None:
    """The same tokens and cache hits, log-probabilities within fp32's rounding."""
    for ours, theirs in zip(got, want, strict=True):
        assert ours.cached == theirs.cached, "other cache hits"
        assert ours.tokens == theirs.tokens, "other tokens"
        torch.testing.assert_close(
            ours.logprobs, theirs.logprobs, rtol=0, atol=TOLERANCE
        )


def assert_policy_shows(got: Reply, want: Reply, prompt: list[int]) -> None:
    """Log-probabilities part where a first token has left the window, not before."""
    difference = (got.logprobs - want.logprobs).abs()[: len(prompt) - 1]
    budget = SINKS + WINDOW
    assert difference[:budget].max() < TOLERANCE
    assert difference[budget:].max() > 100 * TOLERANCE


def lose_sinks(monkeypatch) -> None:
    """What vLLM 0.33 does to a sliding window's row: its first entry becomes null.

    Once all queries are past the window; our rows begin with the sinks.
    """
    from vllm.v1.worker.gpu.block_table import BlockTables

    gather = BlockTables.gather_block_tables

    def lose(self, requests, *args, **kwargs):
        tables = gather(self, requests, *args, **kwargs)
        for table, counts in zip(tables, self.num_blocks.np, strict=True):
            for row, request in zip(table, requests.tolist(), strict=False):
                if counts[request] > 3:
                    row[0] = 0
        return tables

    monkeypatch.setattr(BlockTables, "gather_block_tables", lose)
