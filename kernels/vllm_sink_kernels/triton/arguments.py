"""What decode and prefill make of their common arguments before a launch."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vllm_sink_kernels.triton import launch_config
from vllm_sink_kernels.triton.checks import check_attention
from vllm_sink_kernels.triton.head_table import HeadTable, layout_of
from vllm_sink_kernels.triton.launch_config import LaunchConfig, Row
from vllm_sink_kernels.triton.primitives import PACKED, Scores
from vllm_sink_kernels.triton.turn import Turn

# The tensors of a step by the kernels' names; absent is None.
Pointers = dict[str, Any]


class Variant(NamedTuple):
    """A layer as the compiler sees it: everything that selects code, but None."""

    num_heads: int
    group: int  # query heads of a KV head
    head_size: int
    block_size: int
    rot_dim: int  # 0: sinks at absolute positions
    is_neox: bool
    has_sinks: bool
    k_scale_tensor: bool
    v_scale_tensor: bool
    alignment: int = 0  # of the caches of a table of heads; 0: there is none
    layout: int = int(PACKED)  # of K and V


@dataclass
class AttentionArgs:
    """A layer's T query tokens, what they look at, and where their outputs go.

    The fields are arguments of ``reference.sink_attention``, and checked.

    Args:
        out: [T, HQ, D], written in place.
        cos_sin_cache: as in the reference. Every position must have its row: one past
            the table gives NaN.
        k_scale, v_scale: of an fp8 cache; they may be tensors of one element.
        heads: cache, block table, S and W of each KV head. Those here are not used
            then, and caches and block table are any head's (``heads.k_cache`` ...).
    """

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor
    out: torch.Tensor
    scale: float
    num_sink_tokens: int
    window_size: int
    cos_sin_cache: torch.Tensor | None = None
    is_neox: bool = True
    soft_cap: float = 0.0
    sink_logits: torch.Tensor | None = None
    k_scale: float | torch.Tensor = 1.0
    v_scale: float | torch.Tensor = 1.0
    heads: HeadTable | None = None

    def __post_init__(self) -> None:
        if self.heads is not None:
            self.num_sink_tokens = self.heads.max_sink_tokens
            self.window_size = max(self.heads.budgets) - self.num_sink_tokens
        check_attention(
            self.q,
            self.k_cache,
            self.v_cache,
            self.block_table,
            self.out,
            scale=self.scale,
            num_kv_heads=self.num_kv_heads,
            num_sink_tokens=self.num_sink_tokens,
            window_size=self.window_size,
            cos_sin_cache=self.cos_sin_cache,
            soft_cap=self.soft_cap,
            sink_logits=self.sink_logits,
            k_scale=self.k_scale,
            v_scale=self.v_scale,
        )
        if self.num_sink_tokens == 0:  # nothing to turn for
            self.cos_sin_cache = None

    @property
    def num_kv_heads(self) -> int:
        if self.heads is None:
            return self.k_cache.shape[2]
        return self.heads.num_kv_heads

    @property
    def layout(self) -> int:
        """How K and V lie; for a table of heads those of every head."""
        if self.heads is not None:
            return self.heads.layout
        return layout_of([self.k_cache], [self.v_cache])

    @property
    def budgets(self) -> tuple[int, ...]:
        """S + W of each KV head."""
        if self.heads is None:
            return (self.num_sink_tokens + self.window_size,) * self.num_kv_heads
        return self.heads.budgets

    def variant(self) -> Variant:
        return Variant(
            num_heads=self.q.shape[1],
            group=self.q.shape[1] // self.num_kv_heads,
            head_size=self.q.shape[2],
            block_size=self.k_cache.shape[1],
            rot_dim=0 if self.cos_sin_cache is None else self.cos_sin_cache.shape[1],
            is_neox=self.is_neox,
            has_sinks=self.num_sink_tokens > 0,
            k_scale_tensor=isinstance(self.k_scale, torch.Tensor),
            v_scale_tensor=isinstance(self.v_scale, torch.Tensor),
            alignment=0 if self.heads is None else self.heads.alignment,
            layout=self.layout,
        )

    def config(self, table: dict[str, list[Row]]) -> LaunchConfig:
        return launch_config.lookup(
            table,
            launch_config.target_of(self.q.device),
            head_size=self.q.shape[2],
            group=self.q.shape[1] // self.num_kv_heads,
            budget=max(self.budgets),
            dtype=self.q.dtype,
        )

    def pointers(self) -> Pointers:
        """The tensors of a step."""
        return {
            "q_ptr": self.q,
            "k_ptr": self.k_cache,
            "v_ptr": self.v_cache,
            "block_table_ptr": self.block_table,
            "heads_ptr": None if self.heads is None else self.heads.rows,
            "out_ptr": self.out,
        }

    def fixed(self) -> dict[str, Any]:
        """Run-time arguments that stay as long as shapes and strides do."""
        cs = self.cos_sin_cache
        return {
            "q_strides": self.q.stride()[:2],
            "k_strides": self.k_cache.stride()[:3],
            "v_strides": self.v_cache.stride()[:3],
            "stride_table": self.block_table.stride(0),
            "out_strides": self.out.stride()[:2],
            "scores": Scores(
                self.scale,
                self.soft_cap or None,
                self.sink_logits,
                self.k_scale,
                self.v_scale,
            ),
            "turn": None if cs is None else Turn(cs, cs.stride(0), cs.shape[0]),
            "policy": (self.num_sink_tokens, self.window_size),
        }
