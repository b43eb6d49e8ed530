"""FlashAttention's window and our sinks make the policy, against the reference."""

import pytest
import torch
from vllm_sink_kernels.triton import window
from vllm_sink_kernels.triton.window import WindowPrefill

from tests.kernels.batches import STALE_ID, Batch, assert_close, make_batch
from tests.kernels.flash_stand_in import flash_attn_varlen_func


def run(
    batch: Batch, first_request: int = 0, first_token: int = 0, **kw
) -> torch.Tensor:
    args = batch.layer_args(**kw)
    launch = WindowPrefill(args, flash_attn_varlen_func)
    starts, lens = batch.query_start_loc, torch.tensor(batch.seq_lens).int()
    known = [n for n, m in zip(batch.seq_lens, batch.query_lens, strict=True) if m]
    at = first_request, first_token
    longest = max(batch.query_lens), max(known)
    view = launch.view(batch.block_table, starts, lens, *longest, *at)
    launch(args.pointers(), view, starts, lens, len(batch.q), *at)
    return args.out


def make(**kw) -> Batch:
    """Prefills short and long, chunks around every edge of S + W."""
    shape = {
        "seq_lens": [7, 60, 33, 32, 150, 200],
        "query_lens": [7, 60, 5, 4, 21, 1],
        "dtype": torch.float16,
    }
    return make_batch(**(shape | kw))


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"heads": (5, 1), "block_size": 128, "layout": "packed"},
        {"block_size": 48, "sinks": 20, "head_size": 80, "rot_dim": 32},
        {"sinks": 40, "window": 1, "heads": (2, 2)},
        {"turn": False, "layout": "apart"},
        {"sinks": 0},
        {"seq_lens": [33, 9], "query_lens": [30, 9]},  # S + W = 32
    ],
    ids=str,
)
def test_window_and_sinks_are_the_policy(case):
    batch = make(**case)
    assert_close(batch, run(batch))


def test_requests_that_decode_served_and_padding_stay_as_they_are():
    batch = make(seq_lens=[70, 9, 60, 33], query_lens=[1, 1, 20, 2])
    want = batch.reference()
    table = torch.full((6, batch.block_table.shape[1]), STALE_ID, dtype=torch.int32)
    table[:4] = batch.block_table
    batch.block_table = table
    batch.q = torch.cat([batch.q, torch.full_like(batch.q[:2], torch.nan)])
    batch.query_lens += [0, 0]
    batch.seq_lens += [0, 9999]
    out = run(batch, first_request=2, first_token=2)
    assert out[:2].isnan().all() and out[24:].isnan().all()
    torch.testing.assert_close(out[2:24], want[2:], rtol=2e-3, atol=1e-3)


def test_a_batch_shorter_than_the_budget_is_one_causal_call(monkeypatch):
    monkeypatch.setattr(window, "add_sinks_kernel", None)
    batch = make(seq_lens=[32, 9], query_lens=[30, 9])
    assert_close(batch, run(batch))


@pytest.mark.parametrize(
    "change",
    [
        {"window_size": 27},
        {"num_sink_tokens": 3},
        {"cos_sin_cache": None},
    ],
    ids=str,
)
def test_window_sinks_and_turn_have_an_effect(change):
    batch = make(seq_lens=[120], query_lens=[3])
    out = run(batch)
    other = run(batch, **change)
    assert (other - out).abs().max() > 1e-3, f"{change} has no effect"
    assert_close(batch, other, **change)
