"""Find a model's attention sinks, and the S that its text needs.

    vllm-sink analyze --model M --text FILE [--tokens N] [--out DIR]

From a Hugging Face forward pass in fp32: how much attention each full-attention layer
and head gives to the first tokens, the sink rates of two papers, and the
perplexity of the text under a few S at one budget (positions ``absolute``). Layers
with a window of their own keep it. Names what in the model may make sinks
unnecessary. Prints a summary and the command to serve the model, or why it would not
start; ``--out`` gets analysis.json and a heat map.

The sink metric of a head is the mean attention of all queries to the first token;
the sink rate is the share of (layer, head) pairs above epsilon: 0.3 in Gu et al.
(arXiv 2410.10781), 0.8 in Barbero et al. (arXiv 2504.02732), both here at T = 64.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_sink.policy.config import SinkConfig
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.tools import serve_command, weak_sinks, written
from vllm_sink.tools.cli import print_json
from vllm_sink.tools.heads import attention, texts

TOOL = "vllm-sink analyze"
Reduce = Callable[[torch.Tensor, int], torch.Tensor]

GU_EPSILON, BARBERO_EPSILON = 0.3, 0.8
RATE_LENGTH = 64  # tokens of a sample for the sink rates
FIRST = (1, 2, 4, 8, 16, 64)  # the first k tokens
CANDIDATES = (0, 1, 2, 4, 8, 16)  # S
MARGIN = 0.005  # of the best perplexity: below it sizes are taken as equal


def load(name: str):
    """Model (fp32) whose attention can be watched and replaced, and tokenizer.

    Raises:
        ValueError: It can't be read, or has no layer with full attention.
    """
    model, tokenizer = attention.load(name, dtype="float32")
    attention.inspect(model, list(range(8)))
    return model, tokenizer


def _watched(model, tokens: torch.Tensor, reduce: Reduce) -> torch.Tensor:
    """[L, ...]: ``reduce``'s sums over the queries, by full-attention layer.

    Args:
        tokens: [B, T] int64.
        reduce: (weights [B, H, Q, T] of a tile of queries, first query) -> what to
            sum.
    """
    sums: dict[int, torch.Tensor] = {}

    def watch(layer: int, weights: torch.Tensor, first: int) -> None:
        part = reduce(weights.flatten(1, 2), first)
        sums[layer] = sums[layer] + part if layer in sums else part

    with attention.Headwise(watch=watch):
        model(tokens, use_cache=False)
    return torch.stack([sums[layer] for layer in sorted(sums)])


@torch.inference_mode()
def first_token_share(model, tokens: torch.Tensor) -> torch.Tensor:
    """[L, H]: mean attention to token 0, over the batch and the queries 1 .. T-1.

    Query 0 can look nowhere else and is left out. L counts full-attention layers.

    Args:
        tokens: [B, T] int64.
    """

    def reduce(weights: torch.Tensor, first: int) -> torch.Tensor:
        return weights[:, :, max(1 - first, 0) :, 0].sum((0, 2))

    batch, length = tokens.shape
    return _watched(model, tokens, reduce) / (batch * (length - 1))


@torch.inference_mode()
def first_tokens_share(model, tokens: torch.Tensor) -> dict[int, float]:
    """For each k: the late half's mean attention to the first k tokens."""
    batch, length = tokens.shape
    late = length // 2
    sizes = [k for k in FIRST if k <= late]

    def reduce(weights: torch.Tensor, first: int) -> torch.Tensor:
        rows = weights[:, :, max(late - first, 0) :, : sizes[-1]]
        return rows.mean(1).sum((0, 1)).cumsum(0)

    shares = _watched(model, tokens, reduce).mean(0) / (batch * (length - late))
    return {k: float(shares[k - 1]) for k in sizes}


@torch.inference_mode()
def perplexity(
    model, tokens: list[int], policy: RetentionPolicy | None, start: int
) -> float:
    """Perplexity of ``tokens[start:]`` under the policy; None: the model as it is."""
    batch = torch.tensor([tokens])
    with attention.Headwise(policy=policy):
        logits = model(batch, use_cache=False).logits[0]
    nll = torch.nn.functional.cross_entropy(logits[start - 1 : -1], batch[0, start:])
    return math.exp(float(nll))


def recommend(perplexities: dict[int, float]) -> int:
    """The smallest S within ``MARGIN`` of the best perplexity."""
    best = min(perplexities.values())
    return min(s for s, value in perplexities.items() if value <= best * (1 + MARGIN))


@dataclass
class Sinks:
    """Measurements with one way to begin the text.

    Args:
        starts_with: The first token, as text.
        share: [L][H] attention to the first token, T tokens.
        first_shares: k -> the late half's attention to the first k tokens.
        sink_rates: epsilon -> share of (layer, head) above it, at T = 64.
    """

    starts_with: str
    share: list[list[float]]
    first_shares: dict[int, float]
    sink_rates: dict[float, float]


def find_sinks(model, tokenizer, tokens: list[int], start: list[int]) -> Sinks:
    """Measure with ``start`` (a BOS token, or nothing) before the text."""
    whole = torch.tensor([start + tokens])
    size = RATE_LENGTH - len(start)
    samples = [
        start + tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)
    ]
    metric = first_token_share(model, torch.tensor(samples))
    return Sinks(
        starts_with=tokenizer.decode(whole[0, :1]),
        share=first_token_share(model, whole).tolist(),
        first_shares=first_tokens_share(model, whole),
        sink_rates={
            epsilon: float((metric > epsilon).float().mean())
            for epsilon in (GU_EPSILON, BARBERO_EPSILON)
        },
    )


def analyze(name: str, text: str, num_tokens: int, budget: int) -> dict[str, Any]:
    """The analysis as plain values, which ``summary`` tells in words.

    Raises:
        ValueError: The text is too short, or the budget not below its length.
    """
    model, tokenizer = load(name)
    encoded = tokenizer(text[: 16 * num_tokens], add_special_tokens=False)
    tokens = encoded.input_ids[:num_tokens]
    least = max(budget + 1, 2 * RATE_LENGTH)
    if num_tokens < least:
        raise ValueError(
            f"--tokens must be at least {least}, got {num_tokens}; read more, or give "
            "a smaller --budget"
        )
    if len(tokens) < num_tokens:
        raise ValueError(
            f"--text must hold at least {num_tokens} tokens, got {len(tokens)}; give a "
            "longer text or a smaller --tokens"
        )
    sinks = {"without BOS": find_sinks(model, tokenizer, tokens, [])}
    if tokenizer.bos_token_id is not None:
        bos = [tokenizer.bos_token_id]
        sinks["with BOS"] = find_sinks(model, tokenizer, tokens, bos)
    perplexities = {
        size: perplexity(model, tokens, RetentionPolicy(size, budget - size), budget)
        for size in CANDIDATES
        if size < budget
    }
    full = perplexity(model, tokens, None, budget)
    return {
        "model": name,
        "num_tokens": len(tokens),
        "budget": budget,
        "by_design": weak_sinks.by_design(model),
        "sinks": {key: asdict(value) for key, value in sinks.items()},
        "perplexity": perplexities,
        "perplexity_full_attention": full,
        "recommended_num_sink_tokens": recommend(perplexities),
    }


def summary(result: dict[str, Any]) -> str:
    """The analysis in plain words."""
    lines = [f"{result['model']}, {result['num_tokens']} tokens"]
    for how, sinks in result["sinks"].items():
        rates = sinks["sink_rates"]
        share = torch.tensor(sinks["share"])
        by_layer = share.mean(1)
        first = ", ".join(f"{k}: {v:.0%}" for k, v in sinks["first_shares"].items())
        lines += [
            "",
            f"{how}: the text starts with {sinks['starts_with']!r}",
            f"  {share.mean():.0%} of all attention goes to the first token; most in "
            f"layer {int(by_layer.argmax())} ({by_layer.max():.0%}), least in layer "
            f"{int(by_layer.argmin())} ({by_layer.min():.0%})",
            f"  late tokens give the first k tokens  {first}",
            f"  sink rate: {rates[GU_EPSILON]:.0%} of the heads above {GU_EPSILON} "
            f"(Gu et al.), {rates[BARBERO_EPSILON]:.0%} above {BARBERO_EPSILON} "
            f"(Barbero et al.), at {RATE_LENGTH} tokens",
        ]
    budget, chosen = result["budget"], result["recommended_num_sink_tokens"]
    values = result["perplexity"]
    lines += ["", f"Perplexity after the first {budget} tokens, S + W = {budget}:"]
    lines += [f"  S = {size:2d}  {value:9.2f}" for size, value in values.items()]
    lines.append(f"  full    {result['perplexity_full_attention']:9.2f}")
    if chosen == 0:
        lines.append(
            "Sinks don't matter to this text at this budget: a plain window does as "
            "well. Try a longer --tokens before relying on it."
        )
    else:
        lines.append(
            f"num_sink_tokens = {chosen} is enough: the smallest within {MARGIN:.1%} "
            "of the best. Without sinks the perplexity is "
            f"{values[0] / values[chosen]:.1f} times as high. More only helps to keep "
            "a system prompt in sight."
        )
    lines += weak_sinks.verdict(result["by_design"], values)
    return "\n".join(lines)


def command(result: dict[str, Any]) -> list[str]:
    """The words of the advised command; W is the plugin's default."""
    section = {
        "num_sink_tokens": result["recommended_num_sink_tokens"],
        "window_size": SinkConfig.window_size,
    }
    return serve_command.serve_command(result["model"], section)


def draw(result: dict[str, Any], path: Path) -> None:
    """A heat map [layers, heads] for each way to begin the text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(result["sinks"])
    figure, panels = plt.subplots(1, count, figsize=(4 * count, 5), squeeze=False)
    for axes, (how, sinks) in zip(panels[0], result["sinks"].items(), strict=True):
        picture = axes.imshow(sinks["share"], vmin=0, vmax=1, aspect="auto")
        axes.set(title=how, xlabel="head", ylabel="layer")
    figure.colorbar(
        picture, ax=panels[0].tolist(), label="attention to the first token"
    )
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``vllm-sink analyze``."""
    parser.description = __doc__
    parser.epilog = (
        "example: vllm-sink analyze --model MODEL --text novel.txt --out analysis"
    )
    parser.add_argument("--model", required=True, help="folder or Hub name")
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--tokens", type=int, default=1024, help="read so many")
    parser.add_argument("--budget", type=int, help="S + W; a quarter of --tokens")
    parser.add_argument("--out", type=Path, help="folder for JSON and heat map")


def run(args: argparse.Namespace) -> int:
    """Print the summary or the result; write the files of ``--out``."""
    text = texts.read(args.text).content
    if args.out is not None:
        record, picture = args.out / "analysis.json", args.out / "first_token.png"
        written.refuse_foreign(record, [picture], TOOL)
    result = analyze(args.model, text, args.tokens, args.budget or args.tokens // 4)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        written.write_record(record, TOOL, [picture], result)
        try:
            draw(result, picture)
        except ImportError as error:
            raise ImportError(
                "the heat map needs matplotlib: pip install 'vllm-sink[eval]'"
            ) from error
    if args.json:
        print_json(result)
        return 0
    print(summary(result), flush=True)
    introduction = (
        "Serve it so (take the largest window_size that memory allows, up to the "
        "trained length):"
    )
    print("\n".join(["", *serve_command.advice(introduction, command(result))]))
    return 0
