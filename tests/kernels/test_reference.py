"""The reference against a second one that shares nothing with it.

The second starts from unrotated vectors, rotates with complex numbers and applies
one dense mask in fp64: no block table, no table of cosines, no turn.
"""

import pytest
import torch
from vllm_sink_kernels import reference

from tests.kernels.batches import make_batch, rope_table


def rotate(x: torch.Tensor, positions: torch.Tensor, rot_dim: int, is_neox: bool):
    """RoPE of x [n, H, D] at ``positions`` [n], by complex multiplication."""
    half = rot_dim // 2
    freqs = 1e4 ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(
        torch.ones(len(positions), half, dtype=torch.float64),
        positions.double()[:, None] * freqs,
    )[:, None]
    pairs = (
        torch.complex(x[..., :half], x[..., half:rot_dim])
        if is_neox
        else torch.view_as_complex(x[..., :rot_dim].unflatten(-1, (half, 2)))
    )
    pairs = pairs * turn
    rotated = (
        torch.cat([pairs.real, pairs.imag], -1)
        if is_neox
        else torch.view_as_real(pairs).flatten(-2)
    )
    return torch.cat([rotated, x[..., rot_dim:]], -1)


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("sinks,window", [(4, 12), (0, 9), (7, 1), (20, 30), (3, 99)])
@pytest.mark.parametrize("magnitude", [1.0, 1.7])
@pytest.mark.parametrize("extra", ["plain", "cap+logits", "absolute"])
def test_reference_matches_dense(is_neox, sinks, window, magnitude, extra):
    n, num_heads, num_kv_heads, d, rot_dim, block = 57, 6, 2, 16, 12, 8
    turn = extra != "absolute"
    cap = 3.0 if extra == "cap+logits" else 0.0
    logits = torch.randn(num_heads).double() if extra == "cap+logits" else None
    q, k, v = (torch.randn(n, h, d).double() for h in (num_heads, 2, 2))
    at = torch.arange(n)
    # The magnitude multiplies rotated dims of both sides, as YaRN does.
    m = torch.ones(d).double()
    m[:rot_dim] = magnitude
    q_true = rotate(q, at, rot_dim, is_neox) * m
    q_capped = rotate(q, at.clamp(max=sinks + window - 1), rot_dim, is_neox) * m
    k_true = rotate(k, at, rot_dim, is_neox) * m

    keys = k_true.repeat_interleave(3, 1)
    scores = torch.einsum("qhd,khd->hqk", q_true, keys)
    if turn:
        capped = torch.einsum("qhd,khd->hqk", q_capped, keys)
        scores[..., :sinks] = capped[..., :sinks]
    scores = scores * 0.3
    if cap:
        scores = cap * torch.tanh(scores / cap)
    p, key = at[:, None], at[None, :]
    scores[:, ~((key <= p) & ((key < sinks) | (p - key < window)))] = -torch.inf
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    if logits is not None:
        total = total + (logits[:, None, None] - top).exp()
    want = torch.einsum("hqk,khd->qhd", weights / total, v.repeat_interleave(3, 1))

    blocks = torch.randperm(-(-n // block)).int()
    caches = []
    for x in (k_true, v):
        cache = torch.full((len(blocks), block, num_kv_heads, d), torch.nan).double()
        cache[blocks[at // block].long(), at % block] = x
        caches.append(cache)
    got = reference.sink_attention(
        q_true,
        *caches,
        blocks[None],
        torch.tensor([0, n]).int(),
        torch.tensor([n]).int(),
        scale=0.3,
        num_sink_tokens=sinks,
        window_size=window,
        cos_sin_cache=rope_table(n, rot_dim, magnitude) if turn else None,
        is_neox=is_neox,
        soft_cap=cap,
        sink_logits=logits,
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_turn_is_the_identity_within_the_budget():
    batch = make_batch(seq_lens=[32], query_lens=[32])
    torch.testing.assert_close(
        batch.reference(), batch.reference(cos_sin_cache=None), rtol=0, atol=0
    )


def test_reference_never_reads_the_gap():
    batch = make_batch(seq_lens=[300, 90], query_lens=[5, 1])
    assert not batch.reference().isnan().any()


def test_reference_in_fp32_agrees_with_fp64():
    batch = make_batch(seq_lens=[300, 90], query_lens=[5, 1])
    torch.testing.assert_close(
        batch.reference(),
        batch.reference(compute_dtype=torch.float64),
        rtol=1e-5,
        atol=1e-6,
    )
