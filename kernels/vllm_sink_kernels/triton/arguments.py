"""What decode and prefill make of their common arguments before a launch."""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_sink_kernels.triton import launch_config
from vllm_sink_kernels.triton.checks import check_attention, pow2
from vllm_sink_kernels.triton.head_table import HeadTable, layout_of
from vllm_sink_kernels.triton.launch_config import LaunchConfig, Row
from vllm_sink_kernels.triton.primitives import PACKED


@dataclass(frozen=True)
class Variant:
    """A layer as the compiler sees it: everything that selects code."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    rot_dim: int  # 0: sinks at absolute positions
    is_neox: bool
    has_sinks: bool
    soft_cap: bool
    sink_logits: bool
    k_scale_tensor: bool
    v_scale_tensor: bool
    alignment: int = 0  # of the caches of a table of heads; 0: there is none
    layout: int = int(PACKED)  # of K and V

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    def constants(self, config: LaunchConfig) -> dict[str, Any]:
        """Compile-time arguments that decode and prefill take."""
        return {
            "GROUP": self.group,
            "HEAD_SIZE": self.head_size,
            "BLOCK_SIZE": self.block_size,
            "ROT": self.rot_dim,
            "IS_NEOX": self.is_neox,
            "HAS_SINKS": self.has_sinks,
            "TURN": self.rot_dim > 0,
            "SOFT_CAP": self.soft_cap,
            "SINK_LOGITS": self.sink_logits,
            "K_SCALE_TENSOR": self.k_scale_tensor,
            "V_SCALE_TENSOR": self.v_scale_tensor,
            "HEADS": self.alignment > 0,
            "ALIGNMENT": self.alignment,
            "LAYOUT": self.layout,
            "BLOCK_D": pow2(self.head_size),
            "BLOCK_N": config.block_n,
        }


@dataclass
class AttentionArgs:
    """The arguments of ``reference.sink_attention`` that describe a layer.

    ``heads`` gives each KV head its own cache, block table, S and W: those here are
    then not used, and the caches and the block table are those of any one head.
    """

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor
    out: torch.Tensor
    scale: float
    num_sink_tokens: int
    window_size: int
    cos_sin_cache: torch.Tensor | None
    is_neox: bool
    soft_cap: float
    sink_logits: torch.Tensor | None
    k_scale: float | torch.Tensor
    v_scale: float | torch.Tensor
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
            num_kv_heads=self.num_kv_heads,
            head_size=self.q.shape[2],
            block_size=self.k_cache.shape[1],
            rot_dim=0 if self.cos_sin_cache is None else self.cos_sin_cache.shape[1],
            is_neox=self.is_neox,
            has_sinks=self.num_sink_tokens > 0,
            soft_cap=self.soft_cap > 0,
            sink_logits=self.sink_logits is not None,
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

    def pointers(self) -> dict[str, torch.Tensor]:
        """The tensors of a step; those that a variant does not read are any."""
        return {
            "q_ptr": self.q,
            "k_ptr": self.k_cache,
            "v_ptr": self.v_cache,
            "block_table_ptr": self.block_table,
            "heads_ptr": self.block_table if self.heads is None else self.heads.rows,
            "out_ptr": self.out,
        }

    def fixed(self) -> dict[str, Any]:
        """Run-time arguments that stay as long as shapes and strides do.

        They outlive the step: a pointer that is not read is the cache, not ``q``.
        """
        cs, logits = self.cos_sin_cache, self.sink_logits
        return {
            "cs_ptr": self.k_cache if cs is None else cs,
            "sink_logits_ptr": self.k_cache if logits is None else logits,
            "k_scale": self.k_scale,
            "v_scale": self.v_scale,
            "scale": self.scale,
            "soft_cap": self.soft_cap,
            "num_sink_tokens": self.num_sink_tokens,
            "window_size": self.window_size,
            "num_cs_rows": 0 if cs is None else cs.shape[0],
            "stride_qt": self.q.stride(0),
            "stride_qh": self.q.stride(1),
            "stride_kb": self.k_cache.stride(0),
            "stride_kn": self.k_cache.stride(1),
            "stride_kh": self.k_cache.stride(2),
            "stride_vb": self.v_cache.stride(0),
            "stride_vn": self.v_cache.stride(1),
            "stride_vh": self.v_cache.stride(2),
            "stride_table": self.block_table.stride(0),
            "stride_cs": 0 if cs is None else cs.stride(0),
            "stride_ot": self.out.stride(0),
            "stride_oh": self.out.stride(1),
        }
