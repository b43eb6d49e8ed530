"""Launchers refuse what the kernels cannot do, and pass what kernels ask for."""

import re

import pytest
import torch
from vllm_sink_kernels.triton import (
    cache_write,
    decode,
    launch_config,
    merge,
    prefill,
)
from vllm_sink_kernels.triton.launch_config import INTERPRETER_CORES, Row

from tests.kernels.batches import make_batch

BAD = [
    ({"window_size": 0}, "window_size must be >= 1, got 0; "),
    ({"num_sink_tokens": -1}, "num_sink_tokens must be >= 0, got -1; "),
    ({"window_size": 2**31}, "num_sink_tokens + window_size must be below 2^31"),
    ({"scale": 0.0}, "scale must be > 0, got 0.0; "),
    ({"v_scale": -1.0}, "v_scale must be > 0, got -1.0; "),
    ({"soft_cap": -1.0}, "soft_cap must be >= 0, got -1.0; "),
    (
        {"cos_sin_cache": torch.zeros(9, 66)},
        "rot_dim of cos_sin_cache must be even and at most the head size 64, got 66; ",
    ),
    ({"cos_sin_cache": torch.zeros(9)}, "cos_sin_cache must be [P, rot_dim]"),
    ({"sink_logits": torch.zeros(3)}, "sink_logits must be [HQ] = [4], got [3]; "),
    ({"k_scale": torch.ones(2)}, "k_scale must be a float or a floating-point tensor"),
    ({"sink_logits": torch.zeros(4, device="meta")}, "sink_logits must be on cpu"),
]
REPLACED = [
    ("q", lambda x: x[0], "q must be [T, HQ, D]"),
    ("q", lambda x: x.double(), "q must be float32 or float16 or bfloat16"),
    ("q", lambda x: x.mT.contiguous().mT, "q must be contiguous in its last dim"),
    ("q", lambda x: x[:, :3], "query heads of q must be a multiple of the 2 KV heads"),
    ("q", lambda x: x[..., :60], "head size of q must be a multiple of 8 up to 256"),
    ("k_cache", lambda x: x[..., :32], "k_cache must be [B, N, HKV, D]"),
    ("k_cache", lambda x: x.half(), "k_cache must be float32 or float8_e4m3fn"),
    ("v_cache", lambda x: x[:1], "v_cache must be [B, N, HKV, D]"),
    ("block_table", lambda x: x.long(), "block_table must be int32, got torch.int64"),
]


@pytest.mark.parametrize("kernel", ["decode", "prefill"])
@pytest.mark.parametrize("kw,message", BAD)
def test_bad_keywords(kernel, kw, message):
    batch = make_batch()
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(batch, kernel)(**kw)


@pytest.mark.parametrize("kernel", ["decode", "prefill"])
@pytest.mark.parametrize("name,change,message", REPLACED)
def test_bad_tensors(kernel, name, change, message):
    batch = make_batch()
    setattr(batch, name, change(getattr(batch, name)))
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(batch, kernel)()


def test_bad_arguments_of_one_launcher():
    b = make_batch(seq_lens=[70], query_lens=[2], window=600)
    args, at, rows = b.layer_args(), b.positions(), b.requests()
    with pytest.raises(ValueError, match=r"query_positions must be \[T\] = \[2\]"):
        decode.sink_decode(args, at[:1], rows)
    with pytest.raises(ValueError, match="query_requests must be int32"):
        decode.sink_decode(args, at, rows.long())
    with pytest.raises(ValueError, match=r"workspace must be .* at least 2080 elem"):
        decode.sink_decode(args, at, rows, workspace=torch.empty(9))
    with pytest.raises(ValueError, match="out must be float32"):
        b.layer_args(b.q.half())
    starts, lens = b.query_start_loc, torch.tensor([70]).int()
    with pytest.raises(ValueError, match=r"query_start_loc must be \[R \+ 1\] = \[2\]"):
        prefill.sink_prefill(args, starts[:1], lens)
    with pytest.raises(ValueError, match="first_token must be within the 1 requests"):
        prefill.sink_prefill(args, starts, lens, first_token=3)
    with pytest.raises(ValueError, match="slot_mapping must be int64"):
        cache_write.write_kv_cache(
            b.q[:, :2], b.q[:, :2], b.k_cache, b.v_cache, torch.zeros(2).int()
        )
    with pytest.raises(ValueError, match=r"k_cache must be .*2, 64"):
        cache_write.write_kv_cache(
            b.q, b.q, b.k_cache, b.v_cache, torch.zeros(2).long()
        )


@pytest.mark.parametrize("window", [28, 600])
def test_launch_arguments_are_the_kernels_own(monkeypatch, window):
    """A compiled kernel refuses unknown names; the interpreter drops them."""
    seen = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel
            self.arg_names = kernel.arg_names

        def __getitem__(self, grid):
            def launch(*args, **kw):
                names = set(self.arg_names[: len(args)]) | kw.keys()
                assert names == set(self.arg_names) | {"num_warps"} | (
                    kw.keys() & {"num_stages"}
                )
                seen.append(grid)
                return self.kernel[grid](*args, **kw)

            return launch

    for module, name in (
        (decode, "sink_decode_kernel"),
        (merge, "merge_splits_kernel"),
        (prefill, "sink_prefill_kernel"),
        (cache_write, "write_kv_cache_kernel"),
    ):
        monkeypatch.setattr(module, name, Recorder(getattr(module, name)))
    grids = []
    for n in (70, 700):  # the grid does not follow the sequence
        b = make_batch(seq_lens=[n], query_lens=[2], window=window)
        seen.clear()
        b.decode()
        b.prefill()
        cache_write.write_kv_cache(
            b.q[:, :2], b.q[:, :2], b.k_cache, b.v_cache, torch.tensor([3, -1])
        )
        grids.append(list(seen))
    assert grids[0] == grids[1]
    splits = launch_config.num_splits(2, (4 + window,) * 2, INTERPRETER_CORES)
    assert grids[0][0] == (2, 2, splits)
    assert (splits > 1) == (window == 600)


def test_launchers_do_not_read_device_memory(monkeypatch):
    """Nothing in a launcher waits for the device."""
    batch = make_batch(seq_lens=[70], query_lens=[2])
    starts, lens = batch.query_start_loc, torch.tensor(batch.seq_lens).int()
    at, rows = batch.positions(), batch.requests()

    out = torch.empty_like(batch.q)

    def forbidden(*_):
        raise AssertionError("a launcher read device memory")

    class Nothing:
        def __init__(self, kernel):
            self.arg_names = kernel.arg_names

        def __getitem__(self, grid):
            return lambda *a, **k: None

    monkeypatch.setattr(
        decode, "sink_decode_kernel", Nothing(decode.sink_decode_kernel)
    )
    monkeypatch.setattr(
        prefill, "sink_prefill_kernel", Nothing(prefill.sink_prefill_kernel)
    )
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    args = batch.layer_args(out, k_scale=torch.ones(1), v_scale=torch.ones(()))
    decode.sink_decode(args, at, rows)
    prefill.sink_prefill(args, starts, lens)


def test_tables_end_with_a_row_for_everything():
    for table in (launch_config.DECODE, launch_config.PREFILL, launch_config.FP32):
        assert {"cuda", "hip"} <= table.keys()
        for rows in table.values():
            last = rows[-1]
            assert (last.head_size, last.group) == (256, launch_config.ANY)
            assert last.budget == launch_config.ANY


def test_lookup_takes_the_first_row_that_fits():
    a, b, c = (launch_config.LaunchConfig(16, n, 4, 2) for n in (16, 32, 64))
    any_ = launch_config.ANY
    table = {
        "cuda": [Row(64, 4, 1024, a), Row(64, any_, any_, b), Row(256, any_, any_, c)],
        "sm_90": [Row(256, any_, any_, a)],
        "hip": [Row(256, any_, any_, b)],
    }

    def found(target="sm_89", head_size=64, group=4, budget=1024, dtype=torch.float16):
        return launch_config.lookup(
            table,
            target,
            head_size=head_size,
            group=group,
            budget=budget,
            dtype=dtype,
        )

    assert found() == a
    assert found(group=5) == found(budget=1025) == b
    assert found(head_size=80) == c
    assert found("sm_90", 256) == a
    assert found("gfx1100") == b
    assert (
        found(head_size=80, dtype=torch.float32) == launch_config.FP32["cuda"][0].config
    )
    with pytest.raises(ValueError, match="head_size must be at most 256, got 264"):
        found(head_size=264)


@pytest.mark.parametrize("cores", [8, 132, 304])
@pytest.mark.parametrize(
    "budgets",
    [
        (1028,) * 8,
        (4096,),
        (64,) * 4,
        (131072, 1028, 1028, 1028),
        (1028,) * 7 + (9999,),
    ],
)
def test_splits_follow_machine_batch_and_budget(cores, budgets):
    """Every core has work if there is any, no more than twice what was asked for."""
    busy_heads = sum(budgets) / max(budgets)
    asked = launch_config.PROGRAMS_PER_CORE * cores
    (elements,) = decode.workspace_shape(1, 1, busy_heads, cores)
    before = launch_config.MAX_SPLITS
    for tokens in range(1, 600):
        splits = launch_config.num_splits(tokens, budgets, cores)
        assert splits == 1 << (splits.bit_length() - 1) and splits <= before
        before = splits
        keys = max(budgets) / splits
        assert splits == 1 or keys >= launch_config.KEYS_PER_SPLIT
        programs = tokens * busy_heads * splits
        more = 2 * splits <= min(
            launch_config.MAX_SPLITS, max(budgets) // launch_config.KEYS_PER_SPLIT
        )
        assert programs >= asked or not more
        if splits > 1:
            assert programs < 2 * asked
            assert tokens * splits * 2 <= elements  # one head of one dim, and its lse


def test_the_workspace_is_a_few_megabytes():
    """Llama-3.1-8B's heads on an H100; 541 MB once, for 64 heads and 1,024 requests."""
    (elements,) = decode.workspace_shape(32, 128, 8, 132)
    assert elements * 4 == 1_089_792
    (elements,) = decode.workspace_shape(64, 128, 1, 132)
    assert elements * 4 < 18e6


def test_rounding_alone_depends_on_the_batch():
    """Eight requests have fewer splits than one: the same, to a few ulp."""
    batch = make_batch(window=508, seq_lens=[700], query_lens=[1])
    alone = batch.decode()
    many = 8
    batch.q = batch.q.repeat(many, 1, 1)
    batch.block_table = batch.block_table.repeat(many, 1)
    batch.seq_lens, batch.query_lens = [700] * many, [1] * many
    splits = [
        launch_config.num_splits(n, (512,) * 2, INTERPRETER_CORES) for n in (1, many)
    ]
    assert splits == [4, 1]
    eps = torch.finfo(torch.float32).eps
    assert (batch.decode() - alone).abs().max() <= 8 * eps
