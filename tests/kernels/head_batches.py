"""Batches whose KV heads differ: a cache, a block table and a policy each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm_sink_kernels.triton.arguments import AttentionArgs
from vllm_sink_kernels.triton.decode import sink_decode, workspace_shape
from vllm_sink_kernels.triton.head_table import HeadTable
from vllm_sink_kernels.triton.launch_config import LaunchConfig, num_cores
from vllm_sink_kernels.triton.prefill import sink_prefill

from tests.kernels.batches import NAN, Batch, assert_close, make_batch

EVERYTHING = (0, 4096)  # the policy of a head that keeps all: W reaches every key


@dataclass
class HeadsBatch:
    """A step of a layer, given by a batch of one KV head each."""

    parts: list[Batch]
    kw: dict[str, Any]

    @property
    def q(self) -> torch.Tensor:
        return torch.cat([part.q for part in self.parts], dim=1)

    def __getattr__(self, name: str) -> Any:
        """What the parts share: query_lens, seq_lens, query_start_loc, positions."""
        return getattr(self.parts[0], name)

    def table(self, **changes: Any) -> HeadTable:
        """``changes`` replace arguments of ``HeadTable.build``."""
        given = {
            "k_caches": [part.k_cache for part in self.parts],
            "v_caches": [part.v_cache for part in self.parts],
            "block_tables": [part.block_table for part in self.parts],
            "slot_mappings": [slots_of(part) for part in self.parts],
            "policies": [
                (part.kw["num_sink_tokens"], part.kw["window_size"])
                for part in self.parts
            ],
        }
        return HeadTable.build(**(given | changes))

    def reference(self, **kw: Any) -> torch.Tensor:
        kw = {k: v for k, v in (self.kw | kw).items() if k != "sink_logits"}
        group = self.parts[0].q.shape[1]
        logits = self.kw.get("sink_logits")
        outputs = []
        for i, part in enumerate(self.parts):
            own = None if logits is None else logits[i * group : (i + 1) * group]
            outputs.append(part.reference(sink_logits=own, **kw))
        return torch.cat(outputs, dim=1)

    def layer_args(
        self, heads: HeadTable, q: torch.Tensor | None = None
    ) -> AttentionArgs:
        """The layer and the batch's tokens, or those of ``q``."""
        q = self.q if q is None else q
        return AttentionArgs(
            q,
            heads.k_cache,
            heads.v_cache,
            heads.block_table,
            torch.full_like(q, NAN),
            heads=heads,
            num_sink_tokens=0,  # neither is used
            window_size=1,
            **self.kw,
        )

    def decode(
        self, config: LaunchConfig | None = None, heads: HeadTable | None = None
    ) -> torch.Tensor:
        heads = heads or self.table()
        busy_heads = sum(heads.budgets) / max(heads.budgets)
        shape = workspace_shape(*self.q.shape[1:], busy_heads, num_cores(self.q.device))
        at = self.positions(), self.requests()
        space = torch.full(shape, NAN)
        return sink_decode(self.layer_args(heads), *at, workspace=space, config=config)

    def prefill(
        self,
        config: LaunchConfig | None = None,
        heads: HeadTable | None = None,
        **kw: Any,
    ) -> torch.Tensor:
        at = self.query_start_loc, torch.tensor(self.seq_lens).int()
        args = self.layer_args(heads or self.table())
        return sink_prefill(args, *at, config=config, **kw)


def slots_of(batch: Batch) -> torch.Tensor:
    """[T] int64: where the step's tokens lie in the cache."""
    positions, size = batch.positions().long(), batch.k_cache.shape[1]
    blocks = batch.block_table[batch.requests().long(), positions // size].long()
    return blocks * size + positions % size


def make_heads_batch(
    policies: Sequence[tuple[int, int]],
    *,
    group: int = 2,
    head_size: int = 64,
    dtype: torch.dtype = torch.float32,
    **kw: Any,
) -> HeadsBatch:
    """One KV head a policy (S, W), over the same requests.

    Every head has its own cache and block table, of its own width; what it does
    not retain is NaN or an id far out of range.
    """
    parts = []
    for i, (sinks, window) in enumerate(policies):
        part = make_batch(
            heads=(group, 1),
            head_size=head_size,
            sinks=sinks,
            window=window,
            dtype=dtype,
            **kw,
        )
        spare = part.block_table.new_full((len(part.seq_lens), i), 2**31 - 1)
        part.block_table = torch.cat([part.block_table, spare], dim=1)
        parts.append(part)
    own = ("num_sink_tokens", "window_size")
    shared = {k: v for k, v in parts[0].kw.items() if k not in own}
    return HeadsBatch(parts, shared)


def check_heads(batch: HeadsBatch, config: LaunchConfig | None = None) -> None:
    """Both kernels answer every token of the batch."""
    assert_close(batch, batch.prefill(config))
    assert_close(batch, batch.decode(config))
