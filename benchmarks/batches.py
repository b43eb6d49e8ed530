"""Batches of 1 to 64 requests below S + W, which keep everything.

Nobody should pay for a policy that changes nothing: sink and stock prefill the
same prompts and decode them step by step in turn; the ratio of each pair of steps is
what counts, whatever else the machine does. Each is the first one in half of the
rounds: of two engines in one process the one that was made first was slower by a
twentieth in fp32, whichever it was. With a ``--context`` past S + W: what
the policy gains there.
"""

from __future__ import annotations

from benchmarks import common

BATCHES = (1, 4, 16, 64)
CONTEXT = 900


# By metric and engine: seconds of each round, or step.
Seconds = dict[str, dict[str, list[float]]]


def measure(
    engines, tokens, batch: int, seconds: Seconds, context: int, rounds: int, steps: int
) -> None:
    """Seconds to the first tokens and of a decode step, engines in turn."""
    for i in range(rounds):
        # Other prompts each time: nothing of them is in the prefix cache.
        offset = (i * 97 + batch) % 1000
        prompts = [
            tokens[offset + 31 * j : offset + 31 * j + context] for j in range(batch)
        ]
        for engine in engines:
            for prompt in prompts:
                engine.add(prompt, steps + 2)
        elapsed = {engine.name: 0.0 for engine in engines}
        while any(engine.waiting() for engine in engines):
            for engine in engines:
                elapsed[engine.name] += engine.step()
        for name, total in elapsed.items():
            seconds["ttft"][name].append(total)
        for _ in range(steps):
            for engine in engines:
                seconds["step"][engine.name].append(engine.step())
        for engine in engines:
            while engine.is_busy():
                engine.step()


def add_rows(table, batch: int, context: int, seconds: Seconds) -> None:
    """Medians, and those of the ratios of each pair."""
    for metric, of in seconds.items():
        for name, samples in of.items():
            milliseconds = [1e3 * x for x in samples]
            table.add(name, f"{metric}_{batch}", context, milliseconds, "ms")
        ratios = [a / b for a, b in zip(of["sink"], of["stock"], strict=True)]
        table.add("sink/stock", f"{metric}_{batch}", context, ratios, "x")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24, help="tokens a round")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--context", type=int, default=CONTEXT, help="of a prompt")
    args = parser.parse_args()
    rounds = 3 if args.quick else args.rounds
    table = common.Table("batches", args.model, suffix=args.suffix)
    tokens = common.prose(args.model, 1100 + 31 * max(args.batches) + args.context)
    max_model_len = max(1024, args.context + args.steps + 16)
    for dtype in args.dtypes:
        table.dtype = dtype
        measured: dict[int, Seconds] = {
            batch: {metric: {"sink": [], "stock": []} for metric in ("ttft", "step")}
            for batch in args.batches
        }
        for names in (("sink", "stock"), ("stock", "sink")):
            engines = [
                common.Engine(name, args.model, max_model_len, dtype, max_num_seqs=64)
                for name in names
            ]
            for engine in engines:  # warm-up: compilation, allocation
                engine.add(tokens[-300:], 4)
                while engine.is_busy():
                    engine.step()
            for batch, seconds in measured.items():
                measure(
                    engines,
                    tokens,
                    batch,
                    seconds,
                    args.context,
                    (rounds + 1) // 2,
                    args.steps,
                )
            for engine in engines:
                engine.close()
        for batch, seconds in measured.items():
            add_rows(table, batch, args.context, seconds)
        table.save()


if __name__ == "__main__":
    main()
