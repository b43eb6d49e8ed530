"""vLLM serves a small model through the GPU path and gives what the CPU path gives."""

import pytest
import torch

from tests.helpers.random_llama import save_llama

SINKS, WINDOW = 4, 20
MAX_TOKENS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_llama(
        tmp_path_factory.mktemp("llama"),
        vocab_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        max_position_embeddings=256,
    )


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Both past the window of 24 tokens; one ends while the other is prefilled."""
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randint(1, 128, (length,), generator=generator).tolist()
        for length in (31, 75)
    ]


def serve(model, prompts, *, interpreted, positions="cache", **kwargs):
    """Generated tokens, and log-probabilities of prompt and generated tokens."""
    from vllm import SamplingParams

    from tests.helpers.engine import sink_engine

    section = {
        "num_sink_tokens": SINKS,
        "window_size": WINDOW,
        "sink_positions": positions,
        "triton_interpreter": interpreted,
    }
    settings = {
        "attention_backend": "sink",
        "additional_config": {"sink": section},
        "max_model_len": 128,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 40,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
    }
    with sink_engine(model, **(settings | kwargs)) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": tokens} for tokens in prompts],
            SamplingParams(
                temperature=0,
                max_tokens=MAX_TOKENS,
                ignore_eos=True,
                detokenize=False,
                logprobs=0,
                prompt_logprobs=0,
            ),
            use_tqdm=False,
        )
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    logprobs = [
        entry[token].logprob
        for output, prompt in zip(outputs, prompts, strict=True)
        for entry, token in zip(
            [*output.prompt_logprobs[1:], *output.outputs[0].logprobs],
            [*prompt[1:], *output.outputs[0].token_ids],
            strict=True,
        )
    ]
    return tokens, torch.tensor(logprobs)


@pytest.fixture(scope="module")
def cpu_path(model, prompts):
    return serve(model, prompts, interpreted=False, block_size=16)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Which of the launchers ran, in order."""
    from vllm_sink.attention import gpu

    called: list[str] = []
    for name in ("sink_decode", "sink_prefill", "write_kv_cache"):
        launcher = getattr(gpu, name)

        def record(*args, name=name, launcher=launcher, **kwargs):
            called.append(name)
            return launcher(*args, **kwargs)

        monkeypatch.setattr(gpu, name, record)
    return called


@pytest.mark.parametrize("block_size", [16, 32])
def test_tokens_and_logprobs_of_the_cpu_path(
    model, prompts, cpu_path, calls, block_size
):
    tokens, logprobs = serve(model, prompts, interpreted=True, block_size=block_size)
    assert tokens == cpu_path[0]
    torch.testing.assert_close(logprobs, cpu_path[1], rtol=0, atol=1e-3)
    assert set(calls) == {"sink_decode", "sink_prefill", "write_kv_cache"}
    # A mixed batch: both kernels after one write of a layer.
    assert "write_kv_cache sink_decode sink_prefill" in " ".join(calls)


@pytest.mark.parametrize("ignored", ["turn", "mask"])
def test_ignoring_the_policy_shows(model, prompts, cpu_path, monkeypatch, ignored):
    from vllm_sink.attention import gpu

    # Without a turn to begin with, nothing but the mask changes.
    positions = "cache" if ignored == "turn" else "absolute"
    want = cpu_path[1]
    if ignored == "mask":
        want = serve(model, prompts[:1], interpreted=False, positions=positions)[1]
    for name in ("sink_decode", "sink_prefill"):
        launcher = getattr(gpu, name)

        def ignore(*args, launcher=launcher, **kwargs):
            if ignored == "turn":
                kwargs["cos_sin_cache"] = None
            else:
                kwargs["window_size"] += 4  # all of them in blocks that still live
            return launcher(*args, **kwargs)

        monkeypatch.setattr(gpu, name, ignore)
    _, logprobs = serve(
        model, prompts[:1], interpreted=True, positions=positions, block_size=16
    )
    difference = (logprobs - want[: len(logprobs)]).abs()
    budget = SINKS + WINDOW
    assert difference[: budget - 1].max() < 1e-3
    assert difference[budget:].max() > 1e-2


def test_refused_without_the_interpreter(model, prompts, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(Exception, match="TRITON_INTERPRET must be 1 before Triton"):
        serve(model, prompts, interpreted=True)
