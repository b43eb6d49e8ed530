"""FlashAttention's entry point in torch: the same arguments, the same answers.

It addresses every block of a table up to ``seqused_k``, as FlashAttention may, but
reads the keys alone that a row sees: tests poison the others.
"""

from typing import Any

import torch


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_k: int,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: list[int],
    block_table: torch.Tensor,
    return_softmax_lse: bool,
    out: torch.Tensor,
    fa_version: int,
    **unknown: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``out`` [T, HQ, D], written, and natural log-sum-exps [HQ, T] in fp32."""
    assert causal and return_softmax_lse and fa_version == 3 and not unknown
    assert cu_seqlens_k is None and seqused_k is not None
    assert block_table.shape[0] == len(seqused_k) == len(cu_seqlens_q) - 1
    group, block_size = q.shape[1] // k.shape[2], k.shape[1]
    lse = torch.full((q.shape[1], q.shape[0]), torch.nan)
    starts = cu_seqlens_q.tolist()
    assert starts[0] == 0 and starts[-1] <= len(q)
    for r, n in enumerate(seqused_k.tolist()):
        m = starts[r + 1] - starts[r]
        assert m <= max_seqlen_q and m <= n <= max_seqlen_k
        ids = block_table[r, : -(-n // block_size)].long()
        assert len(ids) == -(-n // block_size), "the table is too narrow"
        assert ((ids >= 0) & (ids < len(k))).all(), f"block ids {ids} addressed"
        for t in range(m):
            p = n - m + t
            low = 0 if window_size[0] < 0 else max(0, p - window_size[0])
            keys = torch.arange(low, p + 1)
            at = ids[keys // block_size], keys % block_size
            own_k = k[at].double().repeat_interleave(group, 1)  # [keys, HQ, D]
            own_v = v[at].double().repeat_interleave(group, 1)
            row = starts[r] + t
            scores = torch.einsum("hd,khd->hk", q[row].double(), own_k) * softmax_scale
            lse[:, row] = scores.logsumexp(1).float()
            out[row] = torch.einsum("hk,khd->hd", scores.softmax(1), own_v).to(q.dtype)
    return out, lse
