"""Flatness, prefill, overhead, recomputation: one long stream through sink and stock.

Prefill runs chunk by chunk, both engines in turn; the sum of the chunks so far
is the time to first token at that length. Then each context is decoded from,
its prompt a prefix-cache hit, again in turn and in rounds.

Contexts below S + W show the overhead: there the policy keeps everything.
"""

from __future__ import annotations

from benchmarks import common

CHUNK = 2048
SHORT = (128, 512, 1000)
LONG = (1028, 2048, 4096, 7168, 16384, 32768)
FULL = (*LONG, 65536)


def prefill(engines: list[tuple[common.Engine, int]], tokens, table) -> None:
    """Each engine up to its own length, chunk by chunk in turn."""
    elapsed = {engine.name: 0.0 for engine, _ in engines}
    for engine, length in engines:
        engine.add(tokens[:length], 1)
    start = 0
    while any(engine.is_busy() for engine, _ in engines):
        start += CHUNK
        for engine, _ in engines:
            if not engine.is_busy():
                continue
            seconds = engine.step()
            elapsed[engine.name] += seconds
            table.add(engine.name, "chunk", start, [seconds], "s")
            table.add(engine.name, "ttft", start, [elapsed[engine.name]], "s")


def decode(engines, tokens, contexts, table, *, rounds: int, steps: int) -> None:
    """Seconds of each output token at each context, the engines in turn."""
    samples: dict[tuple[str, int], list[float]] = {}
    blocks: dict[tuple[str, int], int] = {}
    for _ in range(rounds):
        for context in contexts:
            able = [engine for engine, length in engines if context <= length]
            for engine in able:
                engine.add(tokens[:context], steps + 8)
                engine.num_output_tokens = 0
                while not engine.num_output_tokens:
                    engine.step()
                engine.step()  # the first decode step warms the caches
            for _ in range(steps):
                for engine in able:
                    samples.setdefault((engine.name, context), []).append(engine.step())
            for engine in able:
                blocks[engine.name, context] = engine.live_blocks()
                while engine.is_busy():
                    engine.step()
    for (name, context), seconds in sorted(samples.items()):
        table.add(name, "tpot", context, [1e3 * s for s in seconds], "ms")
        table.add(name, "kv_blocks", context, [blocks[name, context]], "blocks")


def recompute(stock: common.Engine, tokens, table, count: int = 5) -> None:
    """The StreamingLLM paper's baseline: a window computed anew for every token."""
    budget = common.NUM_SINK_TOKENS + common.WINDOW_SIZE
    seconds = []
    for i in range(count):
        # Another first token each time: nothing of it is in the prefix cache.
        stock.add(tokens[i + 1 : i + 1 + budget], 1)
        seconds.append(stock.step())
        assert not stock.is_busy(), "one step must do"
    table.add("recompute", "tpot", budget, [1e3 * s for s in seconds], "ms")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help="tokens a round")
    parser.add_argument("--sink-length", type=int)
    parser.add_argument("--stock-length", type=int)
    args = parser.parse_args()
    long = LONG if args.quick else FULL
    sink_length = args.sink_length or long[-1]
    stock_length = args.stock_length or (16384 if args.quick else 32768)
    table = common.Table("stream", args.model, suffix=args.suffix)
    tokens = common.prose(args.model, sink_length)
    max_model_len = sink_length + args.steps + 16
    contexts = [c for c in (*SHORT, *long) if c <= sink_length]
    for dtype in args.dtypes:
        table.dtype = dtype
        engines = [
            (common.Engine("sink", args.model, max_model_len, dtype), sink_length),
            (common.Engine("stock", args.model, max_model_len, dtype), stock_length),
        ]
        for engine, _ in engines:  # warm-up: compilation, allocation
            engine.add(tokens[-1500:], 4)
            while engine.is_busy():
                engine.step()
        prefill(engines, tokens, table)
        table.save()
        decode(engines, tokens, contexts, table, rounds=args.rounds, steps=args.steps)
        recompute(engines[1][0], tokens, table)
        table.save()
        for engine, _ in engines:
            engine.close()


if __name__ == "__main__":
    main()
