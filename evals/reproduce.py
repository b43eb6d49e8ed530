"""The papers' claims, measured on one model and one long text.

    python -m evals.reproduce sinks     --model M --text novel.txt --name "Emma"
    python -m evals.reproduce positions --model M --text novel.txt --name "Emma"

Each writes a CSV, with its configuration in every row, and a PNG that is drawn
from the CSV alone. ``--plot-only`` draws again.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from pathlib import Path
from typing import Any

from evals import engine, plots
from evals.policies import Policy

SEGMENT = 2048


def read_tokens(model: str, path: Path, count: int) -> list[int]:
    """The first ``count`` tokens of the text, without special tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    # A quarter of the largest plausible size is tokenized, not the whole novel.
    text = path.read_text(encoding="utf-8")[: count * 12]
    tokens = tokenizer(text, add_special_tokens=False).input_ids[:count]
    if len(tokens) < count:
        raise ValueError(
            f"--text must hold at least {count} tokens, got {len(tokens)} in "
            f"{path.name}; give a longer text or a smaller --tokens"
        )
    return tokens


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the CSV by these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def perplexity_rows(args: argparse.Namespace, policies: list[Policy]) -> list[dict]:
    """Mean negative log-probability of each segment under each policy."""
    tokens = read_tokens(args.model, args.text, args.tokens)
    rows = []
    for policy in policies:
        start = time.perf_counter()
        with engine.open_engine(args.model, policy, len(tokens) + 16) as llm:
            # Entry i belongs to token i+1; the first token has none.
            nll = -engine.logprobs(llm, tokens)
        seconds = time.perf_counter() - start
        print(f"{policy.name}: {seconds:.0f} s", flush=True)
        for first in range(0, len(tokens), SEGMENT):
            part = nll[max(first - 1, 0) : first + SEGMENT - 1]
            rows.append(
                {
                    "model": Path(args.model).name,
                    "text": args.name,
                    "dtype": "float32",
                    "policy": policy.name,
                    "num_sink_tokens": policy.num_sink_tokens,
                    "window_size": policy.window_size,
                    "sink_positions": policy.sink_positions,
                    "first_token": first,
                    "num_scored": len(part),
                    "mean_nll": round(float(part.mean()), 5),
                }
            )
    return rows


def sinks(args: argparse.Namespace) -> list[dict]:
    """(a) S = 0 .. 64 at one budget."""
    sizes = [0, 1, 2, 4, 8, 16, 64]
    names = [f"sink:{size}+{args.budget - size}" for size in sizes]
    return perplexity_rows(args, [Policy.parse(name, 0, 1) for name in names])


def positions(args: argparse.Namespace) -> list[dict]:
    """(b) ``cache`` against ``absolute``, with stock attention beside them."""
    size = f"4+{args.budget - 4}"
    names = ["dense", f"sink:{size}:absolute", f"sink:{size}:cache"]
    return perplexity_rows(args, [Policy.parse(name, 0, 1) for name in names])


COMMANDS = {
    "sinks": (sinks, plots.perplexity_by_position),
    "positions": (positions, plots.perplexity_by_position),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evals.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--model", help="folder or Hub name")
    parser.add_argument("--text", type=Path, help="a text file")
    parser.add_argument("--name", help="what to call the text in the CSV")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--budget", type=int, default=1024, help="S + W")
    parser.add_argument("--out", type=Path, default=Path("evals/results"))
    parser.add_argument("--plot-only", action="store_true")
    args = parser.parse_args()
    measure, draw = COMMANDS[args.what]
    path = args.out / f"{args.what}.csv"
    if not args.plot_only:
        if args.model is None or args.text is None:
            parser.error("--model and --text are needed")
        args.name = args.name or args.text.stem
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        write_rows(path, measure(args))
    draw(path, path.with_suffix(".png"))
    print(f"{path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
