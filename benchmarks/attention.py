"""One layer's attention alone: ours and vLLM's CPU kernel in turn, in one process.

Ours is what the engine does: where vLLM's kernel is the faster one (AMX, bfloat16), the
queries that see everything are its work. Heads as SmolLM2's (9 query heads, 3 KV heads
of size 64), S + W = 1,028. ``pair`` is the time per visible query-key pair, ours over
stock's, which sees them all.
"""

from __future__ import annotations

import time

import torch

from benchmarks import common

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 9, 3, 64, 128
# name: (queries, tokens) of each request
CASES = {
    "prefill_1000": [(1000, 1000)],
    "prefill_2048": [(2048, 2048)],
    "chunk_7900": [(2048, 7900)],
    "decode_100": [(1, 100)],
    "decode_1": [(1, 900)],
    "decode_4": [(1, 900)] * 4,
    "decode_16": [(1, 900)] * 16,
    "decode_64": [(1, 900)] * 64,
    "decode_7000": [(1, 7000)],
}


class Case:
    """A step of some layers, for both kernels."""

    def __init__(self, lengths: list[tuple[int, int]], dtype: torch.dtype, layers: int):
        torch.manual_seed(0)
        width = max(-(-n // BLOCK_SIZE) for _, n in lengths)
        num_blocks = 1 + width * len(lengths)
        shape = (num_blocks, NUM_KV_HEADS, 2 * BLOCK_SIZE, HEAD_SIZE)
        self.caches = [torch.randn(shape).to(dtype) for _ in range(layers)]
        order = 1 + torch.randperm(num_blocks - 1).int()
        self.table = order.view(len(lengths), width).contiguous()
        self.starts = [0]
        for count, _ in lengths:
            self.starts.append(self.starts[-1] + count)
        self.lens = [n for _, n in lengths]
        positions = [torch.arange(n - count, n) for count, n in lengths]
        self.positions = torch.cat(positions)
        self.slots = torch.cat(
            [
                self.table[i, p // BLOCK_SIZE].long() * BLOCK_SIZE + p % BLOCK_SIZE
                for i, p in enumerate(positions)
            ]
        )
        total = self.starts[-1]
        self.q = torch.randn(total, NUM_HEADS, HEAD_SIZE).to(dtype)
        self.kv = torch.randn(2, total, NUM_KV_HEADS, HEAD_SIZE).to(dtype)
        self.out = torch.empty_like(self.q)
        self.prepare()

    def prepare(self) -> None:
        from vllm.platforms import current_platform
        from vllm_sink_kernels.cpu import layouts
        from vllm_sink_kernels.cpu.heads import HeadCaches
        from vllm_sink_kernels.cpu.rows import Turns

        from vllm_sink.attention import cpu_stock

        current_platform.import_kernels()
        self.kernel = cpu_stock.kernel_for(self.q.dtype, BLOCK_SIZE, HEAD_SIZE)
        layout = self.kernel.layout if self.kernel else layouts.OWN
        self.heads = [HeadCaches.of_layer(cache, layout) for cache in self.caches]
        angles = torch.randn(len(self.q), HEAD_SIZE // 2)
        self.turns = Turns(((angles.cos(), angles.sin()),), True)
        self.pages = [cache.chunk(2, dim=2) for cache in self.caches]
        self.query_start_loc = torch.tensor(self.starts, dtype=torch.int32)
        self.seq_lens = torch.tensor(self.lens, dtype=torch.int32)

    def sink(self) -> None:
        from vllm_sink_kernels.cpu import attention, layouts, write
        from vllm_sink_kernels.cpu.rows import Kind, Slots

        from vllm_sink.attention.cpu_stock import StockRows

        kind = Kind(self.table, common.NUM_SINK_TOKENS, common.WINDOW_SIZE)
        rows = None
        if self.kernel is not None:
            rows = StockRows.of_step(kind, self.starts, self.lens)
        plan = attention.plan(
            [kind],
            self.starts,
            self.lens,
            block_size=BLOCK_SIZE,
            group_size=NUM_HEADS // NUM_KV_HEADS,
            skipped=None if rows is None else rows.counts,
        )
        slots = Slots.of_kinds([self.slots])
        for heads, cache in zip(self.heads, self.caches, strict=True):
            if heads.layout == layouts.OWN:
                write.write_kv(*self.kv, heads, slots)
            else:
                self.kernel.write(*self.kv, cache, self.slots)
            if rows is not None:
                rows.attend(self.kernel, self.q, cache, self.out, scale=0.125)
            attention.attend(
                self.q, heads, plan, self.out, scale=0.125, turns=self.turns
            )

    def stock(self) -> None:
        from vllm import _custom_ops as ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        isa = _get_attn_isa(self.q.dtype, BLOCK_SIZE, HEAD_SIZE)
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(self.lens),
            num_heads=NUM_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_SIZE,
            seq_lens=self.seq_lens,
            dtype=self.q.dtype,
            query_start_loc=self.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )
        for keys, values in self.pages:
            ops.cpu_attn_reshape_and_cache(*self.kv, keys, values, self.slots, isa)
            ops.cpu_attention_with_kv_cache(
                query=self.q,
                key_cache=keys,
                value_cache=values,
                output=self.out,
                query_start_loc=self.query_start_loc,
                seq_lens=self.seq_lens,
                scale=0.125,
                causal=True,
                alibi_slopes=None,
                sliding_window=-1,
                block_table=self.table,
                softcap=0.0,
                scheduler_metadata=metadata,
                s_aux=None,
            )

    def excess(self) -> float:
        """Pairs that stock sees for each that we see."""
        seen = self.positions + 1
        budget = common.NUM_SINK_TOKENS + common.WINDOW_SIZE
        return float(seen.sum() / seen.clamp(max=budget).sum())


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4, help="of each case")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    args = parser.parse_args()
    table = common.Table("attention", "smollm2", suffix=args.suffix)
    for dtype in args.dtypes:
        table.dtype = dtype
        for name in args.cases:
            case = Case(CASES[name], getattr(torch, dtype), args.layers)
            engines = {"sink": case.sink, "stock": case.stock}
            samples: dict[str, list[float]] = {engine: [] for engine in engines}
            for run in engines.values():  # warm-up
                run()
                run()
            end = time.perf_counter() + args.seconds
            while time.perf_counter() < end or len(samples["stock"]) < 7:
                for engine, run in engines.items():
                    start = time.perf_counter()
                    run()
                    elapsed = time.perf_counter() - start
                    samples[engine].append(1e3 * elapsed / args.layers)
            context = max(case.lens)
            for engine, values in samples.items():
                table.add(engine, name, context, values, "ms")
            pairs = zip(samples["sink"], samples["stock"], strict=True)
            ratios = [a / b for a, b in pairs]
            table.add("sink/stock", name, context, ratios, "x")
            if case.excess() > 1:
                per_pair = [case.excess() * ratio for ratio in ratios]
                table.add("sink/stock", f"{name}_pair", context, per_pair, "x")
            table.save()


if __name__ == "__main__":
    main()
