"""The CPU path: a step planned once, then attention in loops compiled by Numba."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionMetadata, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm_sink_kernels.cpu import (
    amx,
    amx_check,
    attention,
    layouts,
    native,
    write,
)
from vllm_sink_kernels.cpu.heads import HeadCaches
from vllm_sink_kernels.cpu.rows import Kind, Slots, Turns

from vllm_sink.attention.base import SinkBuilderBase, SinkImplBase, Step
from vllm_sink.attention.cpu_stock import (
    StockKernel,
    StockRows,
    begun_blocks,
    faster_kernel,
)
from vllm_sink.rotation.head_counts import refuse_other_heads
from vllm_sink.rotation.table import RotaryTable

logger = init_logger("vllm.plugins.sink")


@functools.cache
def _compile_loops(
    cache_dtype: torch.dtype,
    dtype: torch.dtype,
    layout: int = layouts.OWN,
    kind: int = amx.NONE,
) -> None:
    """The loops are compiled or found now; the log says which, and how long it took."""
    folder = native.FOLDER
    kept = (
        f"kept in {folder}" if folder else "kept nowhere, the next start does it again"
    )
    loops = f"attention loops for {str(dtype).removeprefix('torch.')}"

    def announce() -> None:
        logger.info("Compiling the %s, once; they are %s.", loops, kept)

    start = time.monotonic()
    if attention.compile_for(cache_dtype, dtype, layout, kind, on_start=announce):
        logger.info("Compiled the %s in %.1f s.", loops, time.monotonic() - start)
    else:
        logger.info(
            "Found the %s in %s, %.1f s.", loops, folder, time.monotonic() - start
        )


def _start_loops(spec: AttentionSpec, dtype: torch.dtype, layout: int) -> None:
    """A group's loops are there, with AMX's tiles where those answer rightly."""
    sizes = spec.block_size, spec.head_size
    kind = amx_check.possible(spec.dtype, dtype, layout, *sizes)
    _compile_loops(spec.dtype, dtype, layout, kind)
    fault = amx_check.find_fault(kind, layout, *sizes)
    if fault is not None:
        logger.warning_once("Prompts are multiplied without AMX's tiles: %s.", fault)
        _compile_loops(spec.dtype, dtype, layout)
    elif kind != amx.NONE:
        logger.info_once("Prompts are multiplied in AMX's tiles.")


@dataclass
class SinkCpuPlan:
    """A step's plan, made once for all layers and all groups of heads.

    Args:
        num_tokens: T, query tokens without padding.
        tiles: The queries in tiles; their kinds are the step's parts.
        stock_rows: The rows that vLLM's kernel takes instead, if it takes any.
        begun: Blocks to clear where it may take any, see :func:`begun_blocks`.
        slots: Where each token's K and V go.
        turns: id of a rotary table -> the sink turn.
    """

    num_tokens: int
    tiles: attention.Plan
    slots: Slots
    turns: dict[int, Turns]
    stock_rows: StockRows | None = None
    begun: torch.Tensor | None = None


@dataclass
class SinkCpuMetadata(AttentionMetadata):
    """What one KV cache group gives to a step's plan.

    Args:
        kind: The group's block table and policy.
        slots: [T] int64, where the group's heads write.
        rotations: id of a rotary table -> the rotation, of tables that turns need.
        step: The step that all groups of heads share.
    """

    kind: Kind
    slots: torch.Tensor
    rotations: dict[int, RotaryTable]
    step: Step = field(init=False, repr=False)


class SinkCpuMetadataBuilder(SinkBuilderBase[SinkCpuMetadata]):
    """Plans a step once for all layers of a group."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        impls = [layer.impl for layer in self.layers.values()]
        self.stock = faster_kernel(kv_cache_spec, model.dtype, impls)
        for impl in impls:
            impl.stock = self.stock
        if self.stock is not None:
            logger.info_once(
                "Queries that see everything are the work of vLLM's own kernel (%s).",
                self.stock.isa,
            )
        layout = self.stock.layout if self.stock else layouts.OWN
        _start_loops(kv_cache_spec, model.dtype, layout)
        num_kv_heads = model.get_num_kv_heads(parallel)
        self.group_size = model.get_num_attention_heads(parallel) // num_kv_heads

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SinkCpuMetadata:
        common = common_attn_metadata
        metadata = SinkCpuMetadata(
            kind=Kind(
                common.block_table_tensor,
                self.policy.num_sink_tokens,
                self.policy.window_size,
            ),
            slots=common.slot_mapping[: common.num_actual_tokens],
            rotations=self.rotations,
        )
        step = self.join_step(common, metadata)
        if step.is_ready(self.is_drafters):
            step.plan = _plan(
                step.filled(), common, self.block_size, self.group_size, self.stock
            )
        return metadata


def _plan(
    parts: list[SinkCpuMetadata],
    common: CommonAttentionMetadata,
    block_size: int,
    group_size: int,
    stock: StockKernel | None = None,
) -> SinkCpuPlan:
    """The plan of a step from what its groups gave.

    Args:
        common: Any group's; only what the groups share is read.
        stock: What the group's layers borrow; they are then of one part.
    """
    num_tokens = common.num_actual_tokens
    starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
    seq_lens = common.seq_lens[: common.num_reqs].tolist()
    kinds = [part.kind for part in parts]
    rows, begun = None, None
    if stock is not None:
        assert len(kinds) == 1, "heads of two kinds borrow nothing"
        rows = StockRows.of_step(kinds[0], starts, seq_lens)
        begun = begun_blocks(parts[0].slots, block_size)
    return SinkCpuPlan(
        num_tokens=num_tokens,
        tiles=attention.plan(
            kinds,
            starts,
            seq_lens,
            block_size=block_size,
            group_size=group_size,
            skipped=None if rows is None else rows.counts,
        ),
        slots=Slots.of_kinds([part.slots for part in parts]),
        turns=_turns(parts, num_tokens, starts, seq_lens),
        stock_rows=rows,
        begun=begun,
    )


def _turns(
    parts: list[SinkCpuMetadata],
    num_tokens: int,
    starts: list[int],
    seq_lens: list[int],
) -> dict[int, Turns]:
    """The sink turns of a step: one a rotary table and policy."""
    longest = max(seq_lens, default=0)
    budgets = [part.kind.num_sink_tokens + part.kind.window_size for part in parts]
    rotations = {
        key: rotation
        for part, budget in zip(parts, budgets, strict=True)
        if longest > budget
        for key, rotation in part.rotations.items()
    }
    if not rotations:
        return {}
    # Of a request that ends in row e at length n, row r is at n - e + r.
    ends = torch.tensor(starts[1:])
    offsets = torch.tensor(seq_lens) - ends
    positions = torch.arange(num_tokens) + offsets.repeat_interleave(
        ends - torch.tensor(starts[:-1])
    )
    turns = {}
    for key, rotation in rotations.items():
        pairs = {
            budget: rotation.turn(positions, budget)
            for part, budget in zip(parts, budgets, strict=True)
            if key in part.rotations and longest > budget
        }
        turns[key] = Turns(
            tuple(
                pairs.get(budget) if key in part.rotations else None
                for part, budget in zip(parts, budgets, strict=True)
            ),
            rotation.is_neox,
        )
    return turns


class SinkCpuImpl(SinkImplBase[SinkCpuMetadata]):
    """One layer's attention on the CPU."""

    _caches: HeadCaches | None = None
    # Set by the builder: vLLM's kernel, where rows that see everything are its work.
    stock: StockKernel | None = None

    def forward(
        self,
        layer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SinkCpuMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write this step's K and V, then attend.

        Args:
            query, output: [T, HQ, D]. key, value: [T, HKV, D].
            kv_cache: [B, HKV, N, 2D]; its bytes are used as [B, HKV, 2N, D].
            attn_metadata: None while vLLM warms up.
        """
        if key is not None and len(key) != len(query):
            name = layer.layer_name
            refuse_other_heads(name, self, len(query), len(query), len(key))
        if attn_metadata is None:
            return output
        plan: SinkCpuPlan = attn_metadata.step.plan
        n = plan.num_tokens
        caches = self._head_caches(kv_cache)
        if self.writes_cache and key is not None:
            if plan.begun is not None and len(plan.begun):
                _pages(kv_cache).index_fill_(0, plan.begun, 0)
            if self.stock is None or caches.layout == layouts.OWN:
                write.write_kv(key, value, caches, plan.slots)
            else:
                slots = plan.slots.tensor[0]
                count = len(slots)
                self.stock.write(key[:count], value[:count], _pages(kv_cache), slots)
        turns = None
        if self.rotation is not None:
            turns = plan.turns.get(id(self.rotation.rows))
        if plan.stock_rows is not None:
            assert self.stock is not None, "all layers of a group borrow or none"
            pages = _pages(kv_cache)
            plan.stock_rows.attend(
                self.stock, query[:n], pages, output[:n], scale=self.scale
            )
        attention.attend(
            query[:n],
            caches,
            plan.tiles,
            output[:n],
            scale=self.scale,
            turns=turns,
            soft_cap=self.soft_cap,
            sink_logits=self.sink_logits,
        )
        return output

    def _head_caches(self, kv_cache: torch.Tensor) -> HeadCaches:
        """Made once: the cache of a layer stays where it is.

        Args:
            kv_cache: [B, HKV, N, 2D]; not read where heads have caches of their own.
        """
        known = self._caches
        if self.heads is not None:
            kv_cache = self.heads[0].kv_cache
        if known is None or known.tensors[0].data_ptr() != kv_cache.data_ptr():
            if self.heads is None:
                layout = self.stock.layout if self.stock else layouts.OWN
                known = HeadCaches.of_layer(_pages(kv_cache), layout)
            else:
                known = HeadCaches.of_heads(
                    [_pages(head.kv_cache) for head in self.heads],
                    [head.group.index for head in self.heads],
                )
            self._caches = known
        return known


def _pages(kv_cache: torch.Tensor) -> torch.Tensor:
    """[B, H, N, 2D] -> the same bytes as [B, H, 2N, D]."""
    blocks, heads, size, width = kv_cache.shape
    return kv_cache.view(blocks, heads, 2 * size, width // 2)
