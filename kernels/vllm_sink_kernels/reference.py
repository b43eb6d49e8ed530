"""Naive sink attention in PyTorch: the contract that every kernel is held to.

Query ``p`` sees key ``k`` iff ``k <= p and (k < S or p - k < W)``. Each query is
answered by itself, from the positions it retains and no others, so what lies in
the gap (stale block ids, NaN, freed memory) is never read.
"""

import torch


def retained_positions(
    position: int, num_sink_tokens: int, window_size: int, device: torch.device
) -> torch.Tensor:
    """The keys that a query at ``position`` sees, in order: int64 [n]."""
    sinks = torch.arange(min(num_sink_tokens, position + 1), device=device)
    first = max(num_sink_tokens, position - window_size + 1)
    window = torch.arange(first, max(first, position + 1), device=device)
    return torch.cat([sinks, window])


def turn_query(
    q: torch.Tensor,
    position: int,
    to_position: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
) -> torch.Tensor:
    """Rotate ``q`` [..., D] from ``position`` to ``to_position``.

    Row ``p`` of the table is ``m [cos(rot_dim / 2), sin(rot_dim / 2)]``: the model
    multiplied a query by the matrix of row ``p``. The turn undoes that matrix,
    exactly, and applies the one of ``to_position``; ``m`` cancels. Dims past
    ``rot_dim`` stay as they are.
    """
    half = cos_sin_cache.shape[-1] // 2
    cos, sin = cos_sin_cache[position].to(q.dtype).split(half)
    to_cos, to_sin = cos_sin_cache[to_position].to(q.dtype).split(half)
    norm = cos * cos + sin * sin
    cos, sin = (
        (to_cos * cos + to_sin * sin) / norm,
        (to_sin * cos - to_cos * sin) / norm,
    )
    rot, rest = q[..., : 2 * half], q[..., 2 * half :]
    if is_neox:
        x, y = rot[..., :half], rot[..., half:]
        turned = torch.cat([x * cos - y * sin, y * cos + x * sin], dim=-1)
    else:
        x, y = rot[..., 0::2], rot[..., 1::2]
        turned = torch.stack([x * cos - y * sin, y * cos + x * sin], dim=-1)
        turned = turned.flatten(-2)
    return torch.cat([turned, rest], dim=-1)


def sink_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    num_sink_tokens: int,
    window_size: int,
    cos_sin_cache: torch.Tensor | None = None,
    is_neox: bool = True,
    soft_cap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Attention of T query tokens over the paged cache of R requests.

    Args:
        q: [T, HQ, D], rotated as the model does it.
        k_cache, v_cache: [B, N, HKV, D]; fp8 entries stand for value / scale.
        block_table: int32 [R, max_blocks]; entries in the gap may hold anything.
        query_start_loc: int32 [R + 1]; tokens of request r are ``[r] .. [r + 1]``.
        seq_lens: int32 [R], tokens of the request, those of this step included.
        scale: multiplies q . k.
        num_sink_tokens, window_size: S and W (the query's own position included).
        cos_sin_cache: [P, rot_dim] gives ``cache`` positions: a query past
            S + W - 1 is turned back to S + W - 1 for the sinks. None: ``absolute``.
        is_neox: rotary halves (True) or interleaved pairs (False).
        soft_cap: c > 0 replaces a score s by ``c tanh(s / c)``.
        sink_logits: [HQ], a learned scalar per head in the softmax denominator.
        k_scale, v_scale: scales of an fp8 cache.
        compute_dtype: fp64 for fp64 queries, else fp32; a lower one gives the
            yardstick of the tolerance by ratio.

    Returns:
        [T, HQ, D] in the dtype of ``q``; tokens of no request are zero.
    """
    num_heads, num_kv_heads, block_size = q.shape[1], k_cache.shape[2], k_cache.shape[1]
    if compute_dtype is None:
        compute_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    budget = num_sink_tokens + window_size
    out = torch.zeros_like(q)
    starts, lens = query_start_loc.tolist(), seq_lens.tolist()
    for r, seq_len in enumerate(lens):
        for t in range(starts[r], starts[r + 1]):
            p = seq_len - starts[r + 1] + t
            keys = retained_positions(p, num_sink_tokens, window_size, q.device)
            blocks = block_table[r, keys // block_size].long()
            k = k_cache[blocks, keys % block_size].to(compute_dtype) * k_scale
            v = v_cache[blocks, keys % block_size].to(compute_dtype) * v_scale
            k = k.repeat_interleave(num_heads // num_kv_heads, dim=1)  # [n, HQ, D]
            v = v.repeat_interleave(num_heads // num_kv_heads, dim=1)
            b_q = q[t].to(compute_dtype)  # [HQ, D]
            scores = torch.einsum("hd,nhd->hn", b_q, k)
            if cos_sin_cache is not None and p >= budget:
                # The turn of the angle is fp32 at least: its rows are the model's.
                turn_dtype = torch.promote_types(compute_dtype, torch.float32)
                b_q = turn_query(
                    q[t].to(turn_dtype), p, budget - 1, cos_sin_cache, is_neox
                ).to(compute_dtype)
                sinks = torch.einsum("hd,nhd->hn", b_q, k[:num_sink_tokens])
                scores = torch.cat([sinks, scores[:, num_sink_tokens:]], dim=1)
            scores = scores * scale
            if soft_cap > 0:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            if sink_logits is not None:
                scores = torch.cat([scores, sink_logits[:, None].to(scores)], dim=1)
            weights = torch.softmax(scores, dim=1)[:, : len(keys)]
            out[t] = torch.einsum("hn,nhd->hd", weights, v).to(out.dtype)
    return out
