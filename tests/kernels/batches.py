"""Batches for the kernel tests: paged caches that punish every stray read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm_sink_kernels import reference
from vllm_sink_kernels.triton.arguments import AttentionArgs
from vllm_sink_kernels.triton.decode import sink_decode, workspace_shape
from vllm_sink_kernels.triton.launch_config import LaunchConfig, num_cores
from vllm_sink_kernels.triton.prefill import sink_prefill

NAN = float("nan")
STALE_ID = 2**31 - 1  # far outside every cache


def rope_table(
    num_rows: int, rot_dim: int, magnitude: float = 1.0, theta: float = 1e4
) -> torch.Tensor:
    """vLLM's table: fp64 rows ``magnitude * [cos, sin]``."""
    freqs = theta ** (-torch.arange(0, rot_dim, 2, dtype=torch.float64) / rot_dim)
    angles = torch.arange(num_rows, dtype=torch.float64)[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1) * magnitude


@dataclass
class Batch:
    """Inputs of one step, with keyword arguments in ``kw``."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor
    query_lens: list[int]
    seq_lens: list[int]
    kw: dict[str, Any] = field(default_factory=dict)

    @property
    def query_start_loc(self) -> torch.Tensor:
        return torch.tensor([0, *self.query_lens]).cumsum(0).int()

    def reference(self, **kw: Any) -> torch.Tensor:
        return reference.sink_attention(
            self.q,
            self.k_cache,
            self.v_cache,
            self.block_table,
            self.query_start_loc,
            torch.tensor(self.seq_lens).int(),
            **(self.kw | kw),
        )

    def layer_args(self, out: torch.Tensor | None = None, **kw: Any) -> AttentionArgs:
        """The layer and the batch's tokens; ``out`` is poisoned if it is not given."""
        if out is None:
            out = torch.full_like(self.q, NAN)
        step = self.q, self.k_cache, self.v_cache, self.block_table, out
        return AttentionArgs(*step, **(self.kw | kw))

    def prefill(
        self,
        config: LaunchConfig | None = None,
        first_request: int = 0,
        first_token: int = 0,
        **kw: Any,
    ) -> torch.Tensor:
        return sink_prefill(
            self.layer_args(**kw),
            self.query_start_loc,
            torch.tensor(self.seq_lens).int(),
            first_request=first_request,
            first_token=first_token,
            config=config,
        )

    def positions(self) -> torch.Tensor:
        spans = zip(self.seq_lens, self.query_lens, strict=True)
        return torch.cat([torch.arange(n - m, n) for n, m in spans]).int()

    def requests(self) -> torch.Tensor:
        counts = torch.tensor(self.query_lens)
        return torch.arange(len(counts)).repeat_interleave(counts).int()

    def decode(self, config: LaunchConfig | None = None, **kw: Any) -> torch.Tensor:
        num_heads, head_size = self.q.shape[-2:]
        shape = workspace_shape(
            num_heads, head_size, self.k_cache.shape[2], num_cores(self.q.device)
        )
        return sink_decode(
            self.layer_args(**kw),
            self.positions(),
            self.requests(),
            workspace=torch.full(shape, NAN),
            config=config,
        )


def make_batch(
    *,
    heads: tuple[int, int] = (4, 2),
    head_size: int = 64,
    block_size: int = 16,
    sinks: int = 4,
    window: int = 28,
    seq_lens: Sequence[int] = (70,),
    query_lens: Sequence[int] = (1,),
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    rot_dim: int | None = None,
    magnitude: float = 1.0,
    turn: bool = True,
    layout: str = "NHD",
    **kw: Any,
) -> Batch:
    """Random requests in a cache where only retained slots hold numbers.

    Blocks are permuted; block 0 (the null block), every unwritten slot and every
    slot in the gap of all of a request's queries hold NaN, and gap blocks that no
    query retains carry an id far out of range.
    """
    num_heads, num_kv_heads = heads
    max_blocks = max(-(-n // block_size) for n in seq_lens) + 1
    num_blocks = 1 + sum(-(-n // block_size) for n in seq_lens)
    kv = []
    for _ in "kv":
        store = torch.full(
            (num_blocks, block_size, num_kv_heads, head_size), NAN, dtype=dtype
        )
        kv.append(store)
    ids = (torch.randperm(num_blocks - 1) + 1).int()
    table = torch.full((len(seq_lens), max_blocks), STALE_ID, dtype=torch.int32)
    used = 0
    for r, (n, m) in enumerate(zip(seq_lens, query_lens, strict=True)):
        keys = torch.arange(n)
        keep = (keys < sinks) | (keys > n - m - window)
        for block in (keys[keep] // block_size).unique().tolist():
            table[r, block] = ids[used]
            used += 1
        where = table[r, keys[keep] // block_size].long(), keys[keep] % block_size
        for store in kv:
            store[where] = torch.randn(int(keep.sum()), num_kv_heads, head_size).to(
                dtype
            )
    if layout == "HND":
        kv = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in kv]
    elif layout == "packed":  # [B, H, N, 2 * D]: K and V side by side
        both = torch.cat([x.transpose(1, 2) for x in kv], dim=3)
        kv = [x.transpose(1, 2) for x in both.split(head_size, dim=3)]
    elif layout == "apart":  # K and V have strides of their own
        wide = torch.full((*kv[1].shape[:3], head_size + 8), NAN, dtype=dtype)
        wide[..., :head_size] = kv[1]
        kv[1] = wide[..., :head_size]
    if kv_dtype is not None:
        kv = [x.to(kv_dtype) for x in kv]
    table_rows = max(seq_lens) if seq_lens else 1
    cs = rope_table(table_rows, rot_dim or head_size, magnitude).to(dtype)
    q = torch.randn(sum(query_lens), num_heads, head_size).to(dtype)
    if layout == "packed":  # queries as a slice of a fused projection
        fused = torch.full((len(q), num_heads + 3, head_size), NAN, dtype=dtype)
        fused[:, 1:-2] = q
        q = fused[:, 1:-2]
    return Batch(
        q,
        kv[0],
        kv[1],
        table,
        list(query_lens),
        list(seq_lens),
        {
            "scale": head_size**-0.5,
            "num_sink_tokens": sinks,
            "window_size": window,
            "cos_sin_cache": cs if turn else None,
            **kw,
        },
    )


def assert_close(batch: Batch, out: torch.Tensor, **kw: Any) -> None:
    """Tolerance by ratio: at most 2x the error of the reference in low precision.

    The yardstick for fp32 has nothing lower to run in, so its floor (a few ulp of
    the largest output) decides.
    """
    assert not out.isnan().any(), "NaN leaked"
    want = batch.reference(compute_dtype=torch.float64, **kw).double()
    low = batch.reference(compute_dtype=batch.q.dtype, **kw).double()
    eps = torch.finfo(batch.q.dtype).eps
    floor = 8 * eps * max(1.0, want.abs().max().item())
    limit = 2 * (low - want).abs().max().item() + floor
    error = (out.double() - want).abs().max().item()
    assert error <= limit, f"error {error:.2e} above {limit:.2e}"
