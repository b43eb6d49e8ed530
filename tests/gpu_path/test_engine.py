"""vLLM serves a small model through the GPU path and gives what the CPU path gives."""

import pytest
import torch
from serving import SINKS, WINDOW, serve


@pytest.fixture(scope="module")
def cpu_path(model, prompts):
    return serve(model, prompts, interpreted=False, block_size=16)


@pytest.mark.parametrize("block_size", [16, 32])
def test_tokens_and_logprobs_of_the_cpu_path(
    model, prompts, cpu_path, calls, block_size
):
    tokens, logprobs = serve(model, prompts, interpreted=True, block_size=block_size)
    assert tokens == cpu_path[0]
    torch.testing.assert_close(logprobs, cpu_path[1], rtol=0, atol=1e-3)
    assert set(calls) == {"decode", "prefill", "write"}
    # A mixed batch: both kernels after one write of a layer.
    assert "write decode prefill" in " ".join(calls)


@pytest.mark.parametrize("ignored", ["turn", "mask"])
def test_ignoring_the_policy_shows(model, prompts, cpu_path, monkeypatch, ignored):
    from vllm_sink.attention import gpu

    # Without a turn to begin with, nothing but the mask changes.
    positions = "cache" if ignored == "turn" else "absolute"
    want = cpu_path[1]
    if ignored == "mask":
        want = serve(model, prompts[:1], interpreted=False, positions=positions)[1]
    arguments = gpu.AttentionArgs

    def ignore(**kwargs):
        if ignored == "turn":
            kwargs["cos_sin_cache"] = None
        else:
            kwargs["window_size"] += 4  # all of them in blocks that still live
        return arguments(**kwargs)

    monkeypatch.setattr(gpu, "AttentionArgs", ignore)
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
