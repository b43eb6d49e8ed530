"""KV heads of different policies in one launch, against the reference head by head."""

from dataclasses import replace

import pytest
import torch
from vllm_sink_kernels.triton import decode
from vllm_sink_kernels.triton.cache_write import write_kv_cache
from vllm_sink_kernels.triton.head_table import HeadTable
from vllm_sink_kernels.triton.launch_config import LaunchConfig
from vllm_sink_kernels.triton.primitives import (
    HEAD_COLUMN,
    SINKS_COLUMN,
    WINDOW_COLUMN,
)

from tests.kernels.batches import STALE_ID, assert_close, make_batch
from tests.kernels.head_batches import (
    EVERYTHING,
    HeadsBatch,
    check_heads,
    make_heads_batch,
    slots_of,
)

SMALL = LaunchConfig(block_m=16, block_n=16, num_warps=1, num_stages=1)
STREAM, RETRIEVE = (4, 28), (4, 70)
MIXED = [EVERYTHING, STREAM, RETRIEVE, (0, 28)]


@pytest.mark.parametrize("group,dtype", [(1, torch.float32), (3, torch.float16)])
def test_mixed_batch(group, dtype):
    """Prefill from nothing, a chunk past the windows, decodes short and long."""
    batch = make_heads_batch(
        MIXED,
        group=group,
        dtype=dtype,
        seq_lens=[7, 60, 1, 150],
        query_lens=[7, 5, 1, 1],
    )
    check_heads(batch, SMALL)


@pytest.mark.parametrize("n", [1, 4, 28, 32, 33, 74, 75, 200])
def test_lengths_around_the_edges_of_every_head(n):
    check_heads(make_heads_batch(MIXED, seq_lens=[n], query_lens=[min(n, 3)]), SMALL)


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("layout", ["HND", "packed"])
def test_block_sizes_and_layouts(block_size, layout):
    batch = make_heads_batch(
        [STREAM, EVERYTHING],
        block_size=block_size,
        layout=layout,
        dtype=torch.float16,
        seq_lens=[150, 40],
        query_lens=[2, 1],
    )
    check_heads(batch, SMALL)


@pytest.mark.parametrize(
    "features",
    [
        {"is_neox": False, "rot_dim": 32, "head_size": 80},
        {"turn": False},
        {"soft_cap": 2.0, "sink_logits": True},
    ],
    ids=["interleaved", "absolute", "cap and logits"],
)
def test_features(features):
    if features.get("sink_logits"):
        features = features | {"sink_logits": torch.randn(6)}
    kw = {"seq_lens": [90], "query_lens": [2]}
    check_heads(
        make_heads_batch([EVERYTHING, STREAM, RETRIEVE], **kw, **features), SMALL
    )


def test_fp8_cache():
    """Addresses of V that eight bytes divide, not sixteen."""
    batch = make_heads_batch(
        [STREAM, EVERYTHING],
        kv_dtype=torch.float8_e4m3fn,
        dtype=torch.float16,
        head_size=72,
        seq_lens=[60],
        query_lens=[2],
    )
    for part in batch.parts:  # [B, N, 1, 2 * D] as vLLM has it
        pages = torch.cat([part.k_cache, part.v_cache], dim=3)
        part.k_cache, part.v_cache = pages.split(72, dim=3)
    assert batch.table().alignment == 8
    check_heads(batch, SMALL)


def test_programs_of_the_longest_heads_start_first(monkeypatch):
    """The table's order is the grid's: heads are its slowest axis."""
    grids = []

    class Grids:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda **kw: None

    batch = make_heads_batch(
        [STREAM, (4, 600), RETRIEVE, EVERYTHING], seq_lens=[700], query_lens=[1]
    )
    rows = batch.table().rows
    assert rows[:, HEAD_COLUMN.value].tolist() == [3, 1, 2, 0]
    kept = (rows[:, SINKS_COLUMN.value] + rows[:, WINDOW_COLUMN.value]).tolist()
    assert kept == sorted(kept, reverse=True)
    monkeypatch.setattr(decode, "sink_decode_kernel", Grids())
    monkeypatch.setattr(decode, "merge_splits", lambda *args, **kw: None)
    batch.decode()
    plain = make_batch(window=600, seq_lens=[700], query_lens=[1])
    plain.decode()
    (tokens, splits, heads), (_, plain_heads, plain_splits) = grids
    assert (tokens, heads, plain_heads) == (1, 4, 2)
    assert splits > 1 and plain_splits > 1 and heads != splits


def test_long_heads_split_beside_short_ones():
    """The short head's later splits have no key; so have those of a short request."""
    batch = make_heads_batch([EVERYTHING, STREAM], seq_lens=[700, 9], query_lens=[1, 1])
    check_heads(batch)
    batch.kw["sink_logits"] = torch.randn(4)
    check_heads(batch)


def test_equal_heads_equal_the_plain_policy_exactly():
    """The same bits: one kernel, whatever way a head is given."""
    plain = make_batch(
        heads=(4, 2), sinks=4, window=400, seq_lens=[700, 50], query_lens=[3, 1]
    )
    heads = HeadTable.build(
        [plain.k_cache[:, :, i : i + 1] for i in range(2)],
        [plain.v_cache[:, :, i : i + 1] for i in range(2)],
        [plain.block_table] * 2,
        [slots_of(plain)] * 2,
        [(4, 400)] * 2,
    )
    one = replace(plain, k_cache=heads.k_cache, v_cache=heads.v_cache)
    assert one.decode(heads=heads).equal(plain.decode())
    assert one.prefill(heads=heads).equal(plain.prefill())


def test_prefill_of_the_requests_that_decode_left():
    """First requests and their tokens are skipped, uniform heads or not."""
    kw = {"seq_lens": [70, 9, 60, 33], "query_lens": [1, 1, 20, 2]}
    for batch in (make_heads_batch([STREAM, EVERYTHING], **kw), make_batch(**kw)):
        out = batch.prefill(SMALL, first_request=2, first_token=2)
        assert out[:2].isnan().all()
        torch.testing.assert_close(out[2:], batch.reference()[2:], rtol=1e-4, atol=1e-5)


# What would pass if a part of the table did nothing?


def swap(values: list) -> list:
    return [values[1], values[0], *values[2:]]


@pytest.mark.parametrize("kernel", ["decode", "prefill"])
def test_a_mixed_up_table_shows(kernel):
    batch = make_heads_batch([STREAM, RETRIEVE], seq_lens=[120], query_lens=[2])
    for part in batch.parts:  # every slot holds numbers: nothing shows by NaN alone
        part.k_cache.copy_(torch.randn_like(part.k_cache))
        part.v_cache.copy_(torch.randn_like(part.v_cache))
        ids = torch.randperm(part.block_table.numel()) % len(part.k_cache)
        part.block_table.copy_(ids.view_as(part.block_table))
    out = getattr(batch, kernel)(SMALL)
    assert_close(batch, out)
    parts = batch.parts
    policies = [STREAM, RETRIEVE]
    for change in (
        {"policies": swap(policies)},
        {"policies": [STREAM, STREAM]},
        {"policies": [(3, 28), RETRIEVE]},
        {"block_tables": swap([p.block_table for p in parts])},
        {"k_caches": swap([p.k_cache for p in parts])},
        {"v_caches": swap([p.v_cache for p in parts])},
    ):
        other = getattr(batch, kernel)(SMALL, heads=batch.table(**change))
        assert (other - out).abs().max() > 1e-3, f"{change} has no effect"


@pytest.mark.parametrize("kernel", ["decode", "prefill"])
def test_the_turn_of_one_head_shows(kernel):
    """A head is turned to its own S + W - 1, the one that keeps all never."""
    batch = make_heads_batch(
        [STREAM, RETRIEVE, EVERYTHING], seq_lens=[120], query_lens=[1]
    )
    out = getattr(batch, kernel)(SMALL)
    batch.kw["cos_sin_cache"] = None
    still = getattr(batch, kernel)(SMALL)
    moved = (out - still).abs().amax(dim=(0, 2)).view(3, 2).amax(1)
    assert (moved[:2] > 1e-3).all() and moved[2] == 0
    batch.kw["cos_sin_cache"] = batch.parts[0].kw["cos_sin_cache"]
    batch.parts[1].kw["cos_sin_cache"] = None
    wrong = batch.parts[1].reference()
    assert (wrong - out[:, 2:4]).abs().max() > 1e-3


def test_cache_write_by_the_slots_of_each_head():
    batch = make_heads_batch(MIXED, seq_lens=[70, 9], query_lens=[5, 1])
    slots = [slots_of(part) for part in batch.parts]
    slots[1][2] = slots[3][5] = -1  # one head's token is padding, the other heads' not
    want = []
    for part in batch.parts:
        want.append((part.k_cache.clone(), part.v_cache.clone()))
    k, v = torch.randn(2, 8, 4, 64)  # two rows of padding
    heads = batch.table(slot_mappings=slots)
    write_kv_cache(k, v, heads.k_cache, heads.v_cache, slots[0], heads=heads)
    for i, part in enumerate(batch.parts):
        for t, slot in enumerate(slots[i].tolist()):
            if slot >= 0:
                want[i][0][slot // 16, slot % 16, 0] = k[t, i]
                want[i][1][slot // 16, slot % 16, 0] = v[t, i]
        for got, expected in zip((part.k_cache, part.v_cache), want[i], strict=True):
            assert got.view(torch.int32).equal(expected.view(torch.int32))


BAD = [
    ({"policies": [STREAM]}, "policies must be as many as the 2 k_caches, got 1"),
    ({"policies": [(4, 0), STREAM]}, r"policies must be \(S, W\) with .*got \(4, 0\)"),
    ({"block_tables": [torch.zeros(1, 2).long()] * 2}, "block_tables must be int32"),
    ({"slot_mappings": [torch.zeros(2)] * 2}, "slot_mappings must be int64"),
    (
        {"k_caches": [torch.zeros(9, 16, 2, 64)] * 2},
        r"k_caches must be \[B, N, 1, D\] = \[\*, \*, 1, \*\]",
    ),
    (
        {
            "v_caches": [
                torch.zeros(9, 16, 1, 64),
                torch.zeros(9, 16, 1, 128)[..., :64],
            ]
        },
        r"v_caches must be of one layout, strides \[1024, 64\], got \[2048, 128\]",
    ),
]


@pytest.mark.parametrize("change,message", BAD)
def test_bad_tables(change, message):
    batch = make_heads_batch([STREAM, EVERYTHING])
    with pytest.raises(ValueError, match=message):
        batch.table(**change)


def test_a_table_of_other_heads_is_refused():
    batch = make_heads_batch([STREAM, EVERYTHING, STREAM], group=1)
    batch.parts.pop()
    with pytest.raises(
        ValueError, match="query heads of q must be a multiple of the 3"
    ):
        batch.decode(heads=make_heads_batch([STREAM] * 3).table())
    heads = batch.table()
    k = torch.zeros(1, 3, 64)
    with pytest.raises(ValueError, match="heads must be a table of the 3 KV heads"):
        write_kv_cache(
            k, k, heads.k_cache, heads.v_cache, heads.slot_mapping, heads=heads
        )


def test_padding_tokens_are_zero():
    batch: HeadsBatch = make_heads_batch(MIXED, seq_lens=[700], query_lens=[1])
    heads, q = batch.table(), batch.q.repeat(3, 1, 1)
    for config in (None, SMALL):
        out = decode.sink_decode(
            batch.layer_args(heads, q),
            torch.tensor([699, -1, -1]).int(),
            torch.tensor([0, STALE_ID, -7]).int(),
            config=config,
        )
        assert (out[1:] == 0).all() and not out.isnan().any()
