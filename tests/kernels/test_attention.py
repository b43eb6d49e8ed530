"""Decode and prefill against the reference, over the matrix of STYLE.md."""

from dataclasses import replace

import pytest
import torch
from vllm_sink_kernels.triton.head_table import layout_of
from vllm_sink_kernels.triton.launch_config import LaunchConfig
from vllm_sink_kernels.triton.primitives import ALIKE, APART, PACKED

from tests.kernels.batches import STALE_ID, assert_close, make_batch

SMALL = LaunchConfig(block_m=16, block_n=16, num_warps=1, num_stages=1)
# Tiles inside and at the edges of two sizes.
EDGES = LaunchConfig(block_m=32, block_n=64, num_warps=1, num_stages=1, edge_n=16)
GROUPS = [(4, 4), (8, 2), (5, 1), (9, 3)]


def check(batch, config=SMALL):
    """Both kernels answer every token of the batch."""
    assert_close(batch, batch.prefill(config))
    assert_close(batch, batch.decode(config))


@pytest.mark.parametrize(
    "heads,dtype",
    [(heads, torch.float32) for heads in GROUPS] + [((5, 1), torch.float16)],
)
def test_mixed_batch(heads, dtype):
    """Prefill from nothing, a chunk past the window, decodes short and long."""
    batch = make_batch(
        heads=heads, dtype=dtype, seq_lens=[7, 60, 1, 150], query_lens=[7, 5, 1, 1]
    )
    check(batch)


@pytest.mark.parametrize("n", [1, 3, 15, 16, 17, 27, 28, 29, 31, 32, 33, 34, 200])
def test_lengths_around_every_edge(n):
    """1, block +-1, window +-1, S + W +-1, shorter than the sinks, far past all."""
    check(make_batch(seq_lens=[n], query_lens=[min(n, 3)]))


@pytest.mark.parametrize(
    "head_size,rot_dim,is_neox",
    [
        (64, 64, True),
        (64, 64, False),
        (80, 32, True),
        (80, 32, False),
        (80, 80, True),
        (96, 96, False),
        (128, 64, True),
        (256, 256, False),
    ],
)
def test_head_sizes_and_rotary_dims(head_size, rot_dim, is_neox):
    check(
        make_batch(
            head_size=head_size,
            rot_dim=rot_dim,
            is_neox=is_neox,
            magnitude=1.3,
            seq_lens=[90],
            query_lens=[2],
        )
    )


@pytest.mark.parametrize("block_size", [8, 16, 32, 48, 64, 128])
def test_block_sizes(block_size):
    """A tile holds blocks, lies within one, or neither size divides the other."""
    batch = make_batch(
        heads=(2, 1),
        block_size=block_size,
        sinks=20,
        window=150,
        seq_lens=[300, 40],
        query_lens=[9, 1],
    )
    for config in (EDGES, replace(EDGES, block_n=32, edge_n=0)):
        assert_close(batch, batch.prefill(config))
    assert_close(batch, batch.decode(SMALL))


@pytest.mark.parametrize(
    "sinks,window", [(0, 28), (1, 1), (4, 1), (40, 5), (16, 16), (3, 400), (64, 400)]
)
def test_budgets(sinks, window):
    """S = 0, tiny windows, more sinks than a tile, budgets past the sequence."""
    check(make_batch(sinks=sinks, window=window, seq_lens=[120], query_lens=[3]))


@pytest.mark.parametrize(
    "layout,kind",
    [("NHD", ALIKE), ("HND", ALIKE), ("packed", PACKED), ("apart", APART)],
)
def test_strided_caches_and_queries(layout, kind):
    batch = make_batch(
        layout=layout, dtype=torch.float16, seq_lens=[100, 9], query_lens=[2, 2]
    )
    assert layout_of([batch.k_cache], [batch.v_cache]) == int(kind)
    check(batch)


@pytest.mark.parametrize(
    "turn,soft_cap,with_logits",  # each pair of values of two of them
    [(True, 0.0, True), (True, 2.0, False), (False, 0.0, False), (False, 2.0, True)],
)
def test_features(turn, soft_cap, with_logits):
    batch = make_batch(
        heads=(6, 2), turn=turn, soft_cap=soft_cap, seq_lens=[80], query_lens=[2]
    )
    if with_logits:
        batch.kw["sink_logits"] = torch.tensor([-3.0, 0.0, 1.0, 4.0, 9.0, -9.0])
    check(batch)


def test_soft_cap_of_huge_scores():
    batch = make_batch(soft_cap=30.0, scale=1e4, seq_lens=[80], query_lens=[2])
    assert not batch.prefill(SMALL).isnan().any()
    assert_close(batch, batch.decode(SMALL))


def test_sink_logits_of_minus_infinity_are_none():
    batch = make_batch(heads=(4, 2), seq_lens=[80], query_lens=[2])
    batch.kw["sink_logits"] = torch.full((4,), -torch.inf)
    check(batch)
    torch.testing.assert_close(batch.decode(), batch.decode(sink_logits=None))


@pytest.mark.parametrize("tensor_scales", [True, False])
def test_fp8_cache(tensor_scales):
    """The reference reads the very same fp8 bytes."""
    batch = make_batch(
        kv_dtype=torch.float8_e4m3fn,
        dtype=torch.float16,
        seq_lens=[90],
        query_lens=[2],
    )
    scales = {"k_scale": 0.5, "v_scale": 1.75}
    given = {k: torch.tensor([x]) if tensor_scales else x for k, x in scales.items()}
    assert_close(batch, batch.prefill(SMALL, **given), **scales)
    assert_close(batch, batch.decode(SMALL, **given), **scales)
    assert not torch.allclose(batch.decode(SMALL), batch.decode(SMALL, **given))


def test_splits_merge():
    """A budget of several splits, some of them without a key."""
    check(make_batch(sinks=20, window=580, seq_lens=[40, 700], query_lens=[1, 1]))
    batch = make_batch(window=2000, seq_lens=[17, 1], query_lens=[1, 1])
    batch.kw["sink_logits"] = torch.randn(4)
    check(batch)


def test_long_chunk_has_unmasked_tiles_on_both_sides():
    batch = make_batch(
        heads=(2, 2), sinks=40, window=100, seq_lens=[260], query_lens=[70]
    )
    assert_close(batch, batch.prefill(replace(SMALL, block_m=32)))
    assert_close(batch, batch.prefill())


def test_more_heads_than_rows():
    batch = make_batch(heads=(20, 1), seq_lens=[50], query_lens=[3])
    check(batch)


def test_padded_batch_leaves_no_trace():
    """Empty requests, slots of -1, garbage in their block tables and lengths."""
    batch = make_batch(seq_lens=[70, 40], query_lens=[3, 1])
    want = batch.reference()
    table = torch.full((5, batch.block_table.shape[1]), STALE_ID, dtype=torch.int32)
    table[[0, 2]] = batch.block_table
    padded = replace(
        batch,
        q=torch.cat([batch.q, torch.full_like(batch.q[:2], torch.nan)]),
        block_table=table,
        query_lens=[3, 0, 1, 0, 0],
        seq_lens=[70, 0, 40, 0, 9999],
    )
    out = padded.prefill(SMALL)
    torch.testing.assert_close(out[:4], want, rtol=1e-4, atol=1e-5)
    assert out[4:].isnan().all(), "prefill writes to the queries of requests only"

    from vllm_sink_kernels.triton.decode import sink_decode

    position = torch.cat([batch.positions(), torch.tensor([-1, -1])]).int()
    request = torch.cat([batch.requests() * 2, torch.tensor([STALE_ID, -7])]).int()
    for kw in (batch.kw, batch.kw | {"window_size": 600}):  # one split, and three
        clean = replace(
            padded,
            k_cache=batch.k_cache.nan_to_num(),
            v_cache=batch.v_cache.nan_to_num(),
            block_table=table.clamp(max=0) if kw is not batch.kw else table,
        )
        out = sink_decode(clean.layer_args(**kw), position, request)
        assert (out[4:] == 0).all()
        assert not out.isnan().any()
        if kw is batch.kw:
            torch.testing.assert_close(out[:4], want, rtol=1e-4, atol=1e-5)


def test_empty_batches():
    batch = make_batch(seq_lens=[5], query_lens=[0])
    assert batch.prefill().shape == (0, 4, 64)
    assert batch.decode().shape == (0, 4, 64)


def test_position_past_the_table_is_loud():
    """Out of the table there is no turn to be had: NaN, not a stray read."""
    batch = make_batch(seq_lens=[80], query_lens=[1])
    short = batch.kw["cos_sin_cache"][:79]
    assert batch.decode(cos_sin_cache=short).isnan().all()
    assert batch.prefill(cos_sin_cache=short).isnan().all()


def test_cache_beyond_two_to_the_31_elements():
    """The last block starts past 2^31 elements; untouched pages cost no memory."""
    batch = make_batch(
        heads=(2, 1), dtype=torch.float16, seq_lens=[20], query_lens=[1], window=12
    )
    wide = []
    for cache in (batch.k_cache, batch.v_cache):
        num_blocks = len(cache)
        stride = 2**31 // (num_blocks - 1) + 4096
        storage = torch.empty((num_blocks - 1) * stride + 4096, dtype=torch.float16)
        view = storage.as_strided(cache.shape, (stride, *cache.stride()[1:]))
        view.copy_(cache)
        wide.append(view)
    assert (num_blocks - 1) * stride > 2**31
    batch = replace(batch, k_cache=wide[0], v_cache=wide[1])
    assert batch.block_table[0].clamp(max=99).eq(num_blocks - 1).any()
    check(batch)


# What would pass if a part of the policy did nothing?


@pytest.mark.parametrize("kernel", ["prefill", "decode"])
def test_mask_turn_and_sinks_have_an_effect(kernel):
    batch = make_batch(seq_lens=[120], query_lens=[4])
    # Every slot holds numbers here, so that a wider mask would read them.
    batch.k_cache.copy_(torch.randn_like(batch.k_cache))
    batch.v_cache.copy_(torch.randn_like(batch.v_cache))
    batch.block_table.copy_(torch.arange(batch.block_table.numel())[None] % 7 + 1)
    out = getattr(batch, kernel)(SMALL)
    assert_close(batch, out)
    for change in (
        {"window_size": 27},
        {"window_size": 29},
        {"window_size": 400},
        {"num_sink_tokens": 3},
        {"num_sink_tokens": 0},
        {"cos_sin_cache": None},
        {"is_neox": False},
    ):
        other = getattr(batch, kernel)(SMALL, **change)
        assert (other - out).abs().max() > 1e-3, f"{change} has no effect"
        assert_close(batch, other, **change)


@pytest.mark.parametrize("kernel", ["prefill", "decode"])
def test_one_key_past_the_mask_would_show(kernel):
    """A huge value just outside the mask (both sides, and the future) is not seen."""
    batch = make_batch(sinks=4, window=28, seq_lens=[100], query_lens=[1])
    for key in (4, 71):  # the gap's first and last; 99 asks, so 72 is the oldest seen
        block = batch.block_table[0, key // 16]
        if block != STALE_ID:
            batch.v_cache[block, key % 16] = 1e6
    assert getattr(batch, kernel)().abs().max() < 100
    for key in (3, 72):
        seen = replace(batch, v_cache=batch.v_cache.clone())
        seen.v_cache[seen.block_table[0, key // 16], key % 16] = 1e6
        assert getattr(seen, kernel)().abs().max() > 1e3
