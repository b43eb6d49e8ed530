"""The plan of a step: right, and made without waiting for the device."""

import pytest
import torch
from vllm_sink_kernels.triton import plan as triton_plan

from tests.gpu_path.steps import (
    SINKS,
    WINDOW,
    Step,
    make_batch,
    make_builder,
    make_impl,
)

BATCHES = {
    "decode": {"seq_lens": (70, 9, 33), "query_lens": (1, 1, 1)},
    "mixed": {"seq_lens": (70, 9, 50), "query_lens": (1, 1, 20)},
    "prefill": {"seq_lens": (20, 70), "query_lens": (20, 9)},
    "unordered": {"seq_lens": (50, 70, 40), "query_lens": (20, 1, 3)},
    "verify": {"seq_lens": (70, 9, 50), "query_lens": (3, 1, 2)},
}


def step_and_builder(monkeypatch, kind, **kw):
    batch = make_batch(sinks=SINKS, window=WINDOW, **BATCHES[kind])
    return batch, make_builder(monkeypatch, make_impl(batch), **kw)


def test_what_waits_for_the_device_raises_on_meta():
    """The means of the next test."""
    x = torch.zeros(3, device="meta", dtype=torch.int32)
    for wait in (
        lambda: x[0].item(),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.numpy(),
        lambda: bool(x[0]),
        lambda: int(x[0]),
        lambda: x.nonzero(),
        lambda: x[x > 0],
        lambda: torch.zeros(3).repeat_interleave(x),
        lambda: torch.zeros(3)[: x[0]],
    ):
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            wait()


@pytest.mark.parametrize("num_speculative_tokens", [None, 2])
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("kind", BATCHES)
def test_build_never_waits(monkeypatch, kind, padding, num_speculative_tokens):
    batch, builder = step_and_builder(
        monkeypatch, kind, device="meta", num_speculative_tokens=num_speculative_tokens
    )
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__index__"):
        method = getattr(torch.Tensor, name)

        def guarded(x, *args, name=name, method=method, **kwargs):
            assert x.device.type == "cpu", f"{name} of a device tensor"
            return method(x, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, guarded)

    class Nothing:  # a launch waits for nothing; the interpreter would copy
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    monkeypatch.setattr(triton_plan, "map_tokens_kernel", Nothing())
    common = Step.of(batch, padding, padding).common("meta")
    for plan in (
        builder.build(0, common),
        builder.build_for_cudagraph_capture(common),
        builder.build_for_drafting(common, 0),
    ):
        assert plan.num_tokens == len(batch.q) + padding
        assert plan.query_positions.is_meta


@pytest.mark.parametrize("num_speculative_tokens", [None, 2])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("kind", BATCHES)
def test_tokens_and_split(monkeypatch, kind, padding, num_speculative_tokens):
    batch, builder = step_and_builder(
        monkeypatch, kind, num_speculative_tokens=num_speculative_tokens
    )
    plan = builder.build(0, Step.of(batch, padding, padding).common())
    threshold = 1 + (num_speculative_tokens or 0)
    decodes = []
    for length in batch.query_lens:
        if length > threshold:
            break
        decodes.append(length)
    real = sum(decodes)
    all_decode = len(decodes) == len(batch.query_lens)
    assert plan.num_decode_tokens == real + (padding if all_decode else 0)
    assert plan.query_positions[:real].equal(batch.positions()[:real])
    assert plan.query_requests[:real].equal(batch.requests()[:real])
    assert (plan.query_positions[real:] == -1).all()
    assert (plan.query_requests < plan.block_table.shape[0]).all()
    assert plan.num_decodes == len(decodes) + (padding if all_decode else 0)
    starts = batch.query_start_loc
    assert plan.query_start_loc[: len(starts)].equal(starts)
    assert (plan.query_start_loc[len(starts) :] == starts[-1]).all()
    assert plan.policy.budget == SINKS + WINDOW


def test_empty_requests_between_others_are_skipped(monkeypatch):
    batch, builder = step_and_builder(monkeypatch, "decode")
    step = Step.of(batch, 1, 1)
    step.start_loc[:] = torch.tensor([0, 1, 1, 2, 2])
    plan = builder.build(0, step.common())
    assert plan.query_requests[:2].tolist() == [0, 2]
    assert plan.query_positions.tolist() == [69, 32, -1, -1]


def test_buffers_stay_where_graphs_look_for_them(monkeypatch):
    batch, builder = step_and_builder(monkeypatch, "decode")
    plans = [
        builder.build(0, Step.of(batch, padding, padding).common())
        for padding in (0, 3, 1)
    ]
    for name in ("query_positions", "query_requests"):
        assert len({getattr(plan, name).data_ptr() for plan in plans}) == 1, name


def test_more_decode_tokens_than_the_buffers_hold_are_prefilled(monkeypatch):
    batch, builder = step_and_builder(monkeypatch, "decode", max_num_seqs=2)
    plan = builder.build(0, Step.of(batch).common())
    assert plan.num_decode_tokens == plan.num_decodes == 0


def test_bidirectional_batches_are_refused(monkeypatch):
    batch, builder = step_and_builder(monkeypatch, "prefill")
    common = Step.of(batch).common().replace(causal=False)
    with pytest.raises(ValueError, match=r"attention must be causal .* causal=False"):
        builder.build(0, common)


def test_window_of_any_size(monkeypatch):
    """A window that no distance reaches is cut to one that the kernels take."""
    batch, builder = step_and_builder(monkeypatch, "decode")
    builder = make_builder(
        monkeypatch, make_impl(batch), sliding_window=1 << 40, block_size=16
    )
    assert builder.policy.window_size == 256
    assert builder.policy.num_sink_tokens == 0
