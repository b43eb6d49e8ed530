"""Engines on the GPU path answer as engines on the CPU path do.

On model runner V1. That an ignored mask or turn would show is tested on V2
(tests/runner_v2/test_serving.py), other block sizes in tests/kernels.
"""

import pytest
import torch

from tests.gpu_path.serving import serve


def test_tokens_and_logprobs_of_the_cpu_path(model, prompts, calls):
    want = serve(model, prompts, interpreted=False)
    calls.clear()
    tokens, logprobs = serve(model, prompts, interpreted=True)
    assert tokens == want[0]
    torch.testing.assert_close(logprobs, want[1], rtol=0, atol=1e-3)
    assert set(calls) == {"decode", "prefill", "write"}
    # A mixed batch: both kernels after one write of a layer.
    assert "write decode prefill" in " ".join(calls)


def test_refused_without_the_interpreter(model, prompts, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(Exception, match="TRITON_INTERPRET must be 1 before Triton"):
        serve(model, prompts, interpreted=True)
