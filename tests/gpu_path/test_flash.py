"""Prompts on Hopper, on FlashAttention's stand-in: the kernel that serves them."""

from types import SimpleNamespace

import pytest
import torch

from tests.gpu_path.steps import (
    SINKS,
    WINDOW,
    LayerInputs,
    Step,
    make_batch,
    make_builder,
    make_impl,
)
from tests.gpu_path.test_layer import MIXED, check, forward
from tests.kernels import flash_stand_in
from vllm_sink.attention import gpu_flash


def broken(*args, window_size, **kw):
    """A window that is a token longer."""
    longer = [x + (x > 0) for x in window_size]
    return flash_stand_in.flash_attn_varlen_func(*args, window_size=longer, **kw)


def absent(*args, **kw):
    raise RuntimeError("no kernel image is available")


@pytest.fixture
def hopper(monkeypatch):
    """A function that makes this a Hopper GPU whose FlashAttention is what it is given.

    It returns the list of its calls and that of the log's lines.
    """

    def make(attend):
        served, lines = [], []

        def record(q, *args, **kw):
            served.append(len(q))
            return attend(q, *args, **kw)

        monkeypatch.setattr(gpu_flash, "is_hopper", lambda: True)
        monkeypatch.setattr(gpu_flash, "find_attention", lambda: record)
        monkeypatch.setattr(gpu_flash, "HEAD_SIZES", (64,))
        monkeypatch.setattr(gpu_flash.FlashPrefill, "verdicts", {})
        logger = SimpleNamespace(info_once=lambda line, *x: lines.append(line % x))
        monkeypatch.setattr(gpu_flash, "logger", logger)
        return served, lines

    return make


def serve(monkeypatch, captured=False, dtype=torch.float16):
    batch = make_batch(sinks=SINKS, window=WINDOW, dtype=dtype, **MIXED)
    impl = make_impl(batch)
    builder = make_builder(monkeypatch, impl, cos_sin_cache=batch.kw["cos_sin_cache"])
    step = Step.of(batch, 3, 3)
    if captured:
        plan = builder.build_for_cudagraph_capture(step.common())
    else:
        plan = builder.build(0, step.common())
    inputs = LayerInputs(batch, step.num_tokens)
    # Padding's output is zero, and it is not a NaN that is written over.
    check(batch, inputs, forward(impl, inputs, plan))
    return plan


def test_flash_attention_serves_the_prompts_of_a_step(monkeypatch, hopper, calls):
    served, lines = hopper(flash_stand_in.flash_attn_varlen_func)
    plan = serve(monkeypatch)
    # The device's check, then the step's prompts and their padding.
    assert served == [110, 20, 23]
    assert calls == ["write", "decode", "prefill", "prefill"]  # the check's are two
    assert lines == ["Prompts are served by FlashAttention 3, sinks added by Triton"]
    assert plan.window_view.seq_lens.tolist() == [50, 0, 0, 0]


@pytest.mark.parametrize(
    "attend,reason", [(broken, "differs by"), (absent, "no kernel image")]
)
def test_what_fails_the_check_is_not_used(monkeypatch, hopper, calls, attend, reason):
    _, lines = hopper(attend)
    assert serve(monkeypatch).window_view is None
    assert calls[-1] == "prefill"
    assert len(lines) == 1 and "served by Triton" in lines[0] and reason in lines[0]


def test_a_captured_step_is_ours(monkeypatch, hopper, calls):
    served, _ = hopper(flash_stand_in.flash_attn_varlen_func)
    serve(monkeypatch, captured=True)
    assert not served and "prefill" in calls


def layer(**changes):
    fields = {
        "q": torch.empty(1, 2, 128, dtype=torch.float16),
        "k_cache": torch.empty(1, 16, 1, 128, dtype=torch.float16),
        "heads": None,
        "soft_cap": 0.0,
        "sink_logits": None,
    }
    return SimpleNamespace(**(fields | changes))


@pytest.mark.parametrize(
    "changes,reason",
    [
        ({}, None),
        ({"heads": object()}, "heads of two kinds"),
        ({"q": torch.empty(1, 2, 80)}, "head size 80"),
        ({"k_cache": torch.empty(1, 16, 1, 128)}, "not in 16 bits"),
        ({"k_cache": torch.empty(1, 1, 1, 1).to(torch.float8_e4m3fn)}, "float8"),
        ({"soft_cap": 20.0}, "capped"),
        ({"sink_logits": torch.zeros(2)}, "sink logits"),
    ],
)
def test_only_what_it_can_do_goes_to_flash_attention(changes, reason):
    found = gpu_flash.why_not(layer(**changes))
    assert found is None if reason is None else reason in found
