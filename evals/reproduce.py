"""The papers' claims, measured on one model and one long text.

    python -m evals.reproduce sinks     --model M --text novel.txt --name "Emma"
    python -m evals.reproduce positions --model M --text novel.txt --name "Emma"
    python -m evals.reproduce attention --model M --text novel.txt --name "Emma"
    python -m evals.reproduce mixing    --model M --text novel.txt --name "Emma"

    python -m evals.reproduce heads     --model M --text emma.txt persuasion.txt
    python -m evals.reproduce heads_ppl heads_stability heads_engine heads_methods ...
    python -m evals.reproduce heads_layers heads_layers_engine --model M --text ...
    python -m evals.reproduce all       --model M --text emma.txt persuasion.txt

Each writes a CSV, with its configuration in every row, and most a PNG that is drawn
from the CSV alone. ``--plot-only`` draws again. Those of heads go on where they were
stopped.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import sys
import time
from pathlib import Path
from typing import Any

from evals import heads, layers, methods, plots
from evals.policies import Policy

SEGMENT = 2048
NUM_CHANGES = 8


def read_tokens(model: str, path: Path, count: int) -> list[int]:
    """The first ``count`` tokens of the text, without special tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    # More characters a token than any text has; not the whole novel.
    text = path.read_text(encoding="utf-8")[: count * 12]
    tokens = tokenizer(text, add_special_tokens=False).input_ids[:count]
    if len(tokens) < count:
        raise ValueError(
            f"--text must hold at least {count} tokens, got {len(tokens)} in "
            f"{path.name}; give a longer text or a smaller --tokens"
        )
    return tokens


def described(args: argparse.Namespace) -> dict[str, str]:
    """The columns that every CSV has."""
    return {"model": Path(args.model).name, "text": args.name, "dtype": "float32"}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the CSV by these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def perplexity_rows(args: argparse.Namespace, policies: list[Policy]) -> list[dict]:
    """Mean negative log-probability of each segment under each policy."""
    from tests.helpers.engine import prompt_logprobs

    tokens = read_tokens(args.model, args.text, args.tokens)
    rows = []
    for policy in policies:
        start = time.perf_counter()
        with policy.open_engine(args.model, len(tokens) + 16) as llm:
            # Entry i belongs to token i+1; the first token has none.
            nll = -prompt_logprobs(llm, [tokens])[0].double()
        seconds = time.perf_counter() - start
        print(f"{policy.name}: {seconds:.0f} s", flush=True)
        for first in range(0, len(tokens), SEGMENT):
            part = nll[max(first - 1, 0) : first + SEGMENT - 1]
            rows.append(
                {
                    **described(args),
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


def attention(args: argparse.Namespace) -> list[dict]:
    """(c) attention to the first token by layer and head; no BOS is added."""
    import torch

    from vllm_sink.tools import analyze

    model, _ = analyze.load(args.model)
    tokens = read_tokens(args.model, args.text, args.tokens)
    share = analyze.first_token_share(model, torch.tensor([tokens]))
    return [
        {
            **described(args),
            "num_tokens": args.tokens,
            "layer": layer,
            "head": head,
            "first_token_share": round(float(value), 4),
        }
        for layer, heads in enumerate(share)
        for head, value in enumerate(heads)
    ]


def mixing(args: argparse.Namespace) -> list[dict]:
    """(d) the spread of a change, where a token in the middle is replaced.

    Barbero et al. (arXiv 2504.02732): sinks keep a change from spreading. The
    sink is masked from query 16 on (before, it is needed to become one; hidden
    from all queries, the next token would take its place). Relative change of
    the residual stream, |h' - h| / |h|, mean over the tokens after the changed one.
    """
    import torch

    from vllm_sink.policy.layout import RetentionPolicy
    from vllm_sink.tools import analyze

    model, _ = analyze.load(args.model)
    tokens = read_tokens(args.model, args.text, args.tokens * NUM_CHANGES)
    full = analyze.policy_mask(RetentionPolicy(0, args.tokens), args.tokens)
    masked = full.clone()
    masked[:, :, 16:, 0] = torch.finfo(torch.float32).min
    middle = args.tokens // 2
    rows = []
    for condition, mask in (("sink visible", full), ("sink masked", masked)):
        changes = []
        for index in range(NUM_CHANGES):
            text = tokens[index * args.tokens : (index + 1) * args.tokens]
            other = list(text)
            # A token of the same text: natural, and no other than the old one.
            other[middle] = next(t for t in text[:middle] if t != text[middle])
            hidden = []
            for batch in (text, other):
                with torch.inference_mode():
                    output = model(
                        torch.tensor([batch]),
                        attention_mask=mask,
                        output_hidden_states=True,
                        use_cache=False,
                    )
                hidden.append(torch.stack(output.hidden_states)[:, 0, middle + 1 :])
            change = (hidden[1] - hidden[0]).norm(dim=-1) / hidden[0].norm(dim=-1)
            changes.append(change)  # [L+1, tokens after the changed one]
        each = torch.stack(changes)
        for layer in range(each.shape[1]):
            rows.append(
                {
                    **described(args),
                    "num_tokens": args.tokens,
                    "num_changes": NUM_CHANGES,
                    "condition": condition,
                    "after_layer": layer,
                    "mean_relative_change": f"{each[:, layer].mean():.4g}",
                    "share_of_tokens_above_5_percent": round(
                        float((each[:, layer] > 0.05).float().mean()), 4
                    ),
                }
            )
    return rows


COMMANDS = {
    "sinks": (sinks, plots.perplexity_by_position),
    "positions": (positions, plots.perplexity_by_position),
    "attention": (attention, plots.attention_by_layer),
    "mixing": (mixing, plots.change_by_layer),
}
# These read several texts and write their rows themselves.
HEADS = {
    "heads": (heads.measure_needles, plots.needles_by_memory),
    "heads_ppl": (heads.measure_perplexity, plots.perplexity_by_fraction),
    "heads_stability": (heads.measure_stability, None),
    "heads_engine": (heads.measure_engine, None),
    "heads_methods": (methods.measure, None),
    "heads_layers": (layers.measure, None),
    "heads_layers_engine": (layers.measure_engine, None),
}
# For a model with few full-attention layers: no part of ``all``.
BY_NAME = {"heads_layers", "heads_layers_engine"}
# Eager attention holds every weight; these need no long text.
SHORT = {"attention": 1024, "mixing": 256}


def reproduce(what: str, given: argparse.Namespace) -> None:
    """Measure one claim, unless --plot-only, and draw it."""
    args = copy.copy(given)
    path = args.out / f"{what}.csv"
    if what in HEADS:
        args.texts = args.text
        fill, draw = HEADS[what]
        if not args.plot_only:
            fill(args, path)
    else:
        measure, draw = COMMANDS[what]
        if not args.plot_only:
            args.text = args.text[0]
            args.tokens = args.tokens or SHORT.get(what, 16_384)
            args.name = args.name or args.text.stem
            write_rows(path, measure(args))
    if draw is not None:
        draw(path, path.with_suffix(".png"))
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evals.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = [*COMMANDS, *HEADS]
    parser.add_argument("what", nargs="+", choices=[*known, "all"])
    parser.add_argument("--model", help="folder or Hub name")
    parser.add_argument("--text", type=Path, nargs="+", help="text files")
    parser.add_argument("--name", help="what to call the text in the CSV")
    parser.add_argument(
        "--tokens", type=int, help="16,384; less for attention and mixing"
    )
    parser.add_argument("--budget", type=int, default=1024, help="S + W")
    parser.add_argument("--out", type=Path, default=Path("evals/results"))
    parser.add_argument("--lengths", type=int, nargs="+", help="heads: of haystacks")
    parser.add_argument(
        "--haystacks", type=int, help="heads: of each length; 13, heads_layers: 6"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[*methods.METHODS],
        default=[*methods.METHODS],
        help="heads_methods: these alone",
    )
    parser.add_argument("--plot-only", action="store_true")
    args = parser.parse_args()
    if not args.plot_only:
        if args.model is None or args.text is None:
            parser.error("--model and --text are needed")
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    every = [what for what in known if what not in BY_NAME]
    for what in every if "all" in args.what else args.what:
        reproduce(what, args)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
