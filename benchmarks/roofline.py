"""A roofline on paper: what decode and prefill must move and multiply, from the tiles.

    python -m benchmarks.roofline            # prints the tables of docs/performance.md

Nothing here was measured. Tiles, splits and padding are the kernels' own
(``launch_config``); bandwidth and matrix throughput are the vendors' figures for
dense bf16. A layer's attention alone is counted: one write of K and V, decode or
prefill, and the merge of splits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_sink_kernels.triton import launch_config
from vllm_sink_kernels.triton.checks import pow2

SINKS = 4
CHUNK = 2048  # query tokens of a prefill, past the window
BUDGETS = (1024, 4096, 32768)
BATCHES = (1, 8, 64, 256)
ELEMENT = 2  # bytes of bf16
# FlashAttention 3's tile for head size 128, a window and no sinks.
FA3_QUERIES, FA3_KEYS = 128, 128


@dataclass(frozen=True)
class Model:
    name: str
    heads: int
    kv_heads: int
    head_size: int
    layers: int  # under the policy


@dataclass(frozen=True)
class Machine:
    name: str
    target: str
    cores: int
    bandwidth: float  # bytes a second
    flops: float  # of matrix units a second, bf16


MODELS = (
    Model("Llama-3.1-8B", 32, 8, 128, 32),
    Model("Qwen3-30B-A3B", 32, 4, 128, 48),
    Model("gpt-oss-20b", 64, 8, 64, 12),
)
MACHINES = (
    Machine("H100 SXM", "sm_90", 132, 3.35e12, 989e12),
    Machine("MI300X", "gfx942", 304, 5.3e12, 1307e12),
)


def config_of(table, machine: Machine, model: Model, budget: int):
    return launch_config.lookup(
        table,
        machine.target,
        head_size=model.head_size,
        group=model.heads // model.kv_heads,
        budget=budget,
    )


@dataclass(frozen=True)
class Work:
    """Of one layer: bytes to and from memory, operations, programs."""

    bytes: float
    flops: float
    programs: int

    def bound(self, machine: Machine) -> tuple[float, str]:
        """Microseconds, and the resource that takes them."""
        memory = self.bytes / machine.bandwidth * 1e6
        matrix = self.flops / machine.flops * 1e6
        busy = min(1.0, self.programs / machine.cores)
        limit = max(memory, matrix) / busy
        if busy < 1:
            return limit, "programs"
        return limit, "memory" if memory >= matrix else "matrix units"


def decode(machine: Machine, model: Model, budget: int, batch: int) -> Work:
    config = config_of(launch_config.DECODE, machine, model, budget)
    budgets = (budget,) * model.kv_heads
    splits = launch_config.num_splits(batch, budgets, machine.cores)
    d, rows = model.head_size, pow2(model.heads // model.kv_heads)
    tiles = math.ceil(SINKS / config.block_n)
    tiles += math.ceil((budget - SINKS) / config.block_n)
    keys = batch * model.kv_heads * budget
    moved = keys * 2 * d * ELEMENT  # K and V once: masked keys are not loaded
    moved += 2 * batch * model.heads * d * ELEMENT  # queries, outputs
    moved += 2 * 2 * batch * model.kv_heads * d * ELEMENT  # the step's K and V
    if splits > 1:
        moved += 2 * batch * model.heads * splits * (d + 1) * 4
    flops = 4 * batch * model.kv_heads * tiles * config.block_n * rows * d
    return Work(moved, flops, batch * model.kv_heads * splits)


def prefill(machine: Machine, model: Model, budget: int) -> Work:
    config = config_of(launch_config.PREFILL, machine, model, budget)
    group, d = model.heads // model.kv_heads, model.head_size
    block_m = max(config.block_m, group)
    tile_q = block_m // group
    programs = math.ceil(CHUNK / tile_q) * model.kv_heads
    edge = config.edge_n or config.block_n  # what the ends are rounded to
    tiles = math.ceil(SINKS / edge)
    tiles += math.ceil((budget - SINKS + tile_q - 1) / edge)
    flops = 4 * programs * tiles * edge * block_m * d
    # Each key once: the tiles of a head run close together and share the L2.
    moved = (budget + CHUNK) * model.kv_heads * 2 * d * ELEMENT
    moved += 2 * CHUNK * (model.heads + model.kv_heads) * d * ELEMENT
    return Work(moved, flops, programs)


def fa3_prefill(model: Model, budget: int) -> float:
    """Operations of FlashAttention 3 with a window of S + W, without sinks."""
    tiles = math.ceil(CHUNK / FA3_QUERIES) * model.heads
    keys = math.ceil((budget + FA3_QUERIES - 1) / FA3_KEYS) * FA3_KEYS
    return 4.0 * tiles * FA3_QUERIES * keys * model.head_size


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report() -> str:
    parts = []
    for machine in MACHINES:
        rows = []
        for model in MODELS:
            for budget in BUDGETS:
                cells = []
                for batch in BATCHES:
                    work = decode(machine, model, budget, batch)
                    time, bound = work.bound(machine)
                    cells.append(
                        f"{work.bytes / 1e6:,.1f} MB, {work.programs:,} programs: "
                        f"{time:,.1f} us ({bound})"
                    )
                rows.append([model.name, f"{budget:,}", *cells])
        header = ["model", "S + W", *(f"batch {batch}" for batch in BATCHES)]
        parts.append(f"### Decode of one token, a layer, {machine.name}\n")
        parts.append(table(header, rows) + "\n")
    rows = []
    for model in MODELS:
        for budget in BUDGETS:
            cells = []
            for machine in MACHINES:
                work = prefill(machine, model, budget)
                time, bound = work.bound(machine)
                cells.append(f"{work.flops / 1e9:,.0f} GFLOP: {time:,.0f} us ({bound})")
            cells.append(f"{fa3_prefill(model, budget) / 1e9:,.0f} GFLOP")
            rows.append([model.name, f"{budget:,}", *cells])
    header = ["model", "S + W", *(m.name for m in MACHINES), "FlashAttention 3"]
    parts.append(f"### Prefill of {CHUNK:,} tokens past the window, a layer\n")
    parts.append(table(header, rows))
    return "\n".join(parts)


if __name__ == "__main__":
    print(report())
