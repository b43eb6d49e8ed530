"""Find a model's attention sinks, and the S that its text needs.

    vllm-sink analyze --model M --text FILE [--tokens N] [--out DIR]

From a Hugging Face forward pass with eager attention, in fp32: how much attention
each layer and head gives to the first tokens, the sink rates of two papers, and the
perplexity of the text under a few S at one budget (positions ``absolute``). Layers
with a window of their own keep it. Names what in the configuration may make sinks
unnecessary. Prints a summary and the command to serve the model, or why it would not
start; ``--out`` gets analysis.json and a heat map.

The sink metric of a head is the mean attention of all queries to the first token;
the sink rate is the share of (layer, head) pairs above epsilon: 0.3 in Gu et al.
(arXiv 2410.10781), 0.8 in Barbero et al. (arXiv 2504.02732), both here at T = 64.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_sink.policy.config import SinkConfig
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.tools import serve_command, weak_sinks, written
from vllm_sink.tools.cli import print_json
from vllm_sink.tools.heads import attention, texts
from vllm_sink.tools.reading import load_whole, reading

TOOL = "vllm-sink analyze"

GU_EPSILON, BARBERO_EPSILON = 0.3, 0.8
RATE_LENGTH = 64  # tokens of a sample for the sink rates
FIRST = (1, 2, 4, 8, 16, 64)  # the first k tokens
CANDIDATES = (0, 1, 2, 4, 8, 16)  # S
MARGIN = 0.005  # of the best perplexity: below it sizes are taken as equal


class AttentionProbe:
    """Reduces every layer's attention weights while the model runs.

    Args:
        model: A decoder with eager attention: its attention modules return
            (output, weights [B, H, T, T]).
        reduce: [B, H, T, T] -> a small tensor, kept for each layer.
    """

    def __init__(self, model, reduce) -> None:
        self.reduce = reduce
        self.layers: dict[int, torch.Tensor] = {}
        self._hooks = [
            module.register_forward_hook(self._hook)
            for module in model.modules()
            if isinstance(getattr(module, "layer_idx", None), int)
            and type(module).__name__.endswith("Attention")
        ]

    def _hook(self, module, arguments, output) -> None:
        weights = output[1] if isinstance(output, tuple) else None
        if weights is not None:
            self.layers[module.layer_idx] = self.reduce(weights)

    def __enter__(self) -> AttentionProbe:
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()

    def stacked(self) -> torch.Tensor:
        """[L, ...] in the order of the layers.

        Raises:
            ValueError: No layer returned its weights.
        """
        if not self.layers:
            raise ValueError(
                "model must return attention weights with attn_implementation="
                "'eager', got none; its architecture can't be analysed"
            )
        return torch.stack([self.layers[index] for index in sorted(self.layers)])


def load(name: str):
    """Model (fp32, eager attention) and tokenizer."""
    from transformers import AutoTokenizer

    with reading(name):
        model = load_whole(name, dtype=torch.float32, attn_implementation="eager")
        return model, AutoTokenizer.from_pretrained(name)


@torch.inference_mode()
def first_token_share(model, tokens: torch.Tensor) -> torch.Tensor:
    """[L, H]: mean attention to token 0, over the batch and the queries 1 .. T-1.

    Query 0 can look nowhere else and is left out.

    Args:
        tokens: [B, T] int64.
    """
    with AttentionProbe(model, lambda w: w[:, :, 1:, 0].mean((0, 2))) as probe:
        model(tokens, use_cache=False)
    return probe.stacked()


@torch.inference_mode()
def first_tokens_share(model, tokens: torch.Tensor) -> dict[int, float]:
    """For each k: the late half's mean attention to the first k tokens."""
    late = tokens.shape[1] // 2

    def reduce(weights: torch.Tensor) -> torch.Tensor:
        mass = weights[:, :, late:].mean((0, 1, 2)).cumsum(0)
        return mass[[k - 1 for k in FIRST if k <= late]]

    with AttentionProbe(model, reduce) as probe:
        model(tokens, use_cache=False)
    shares = probe.stacked().mean(0).tolist()
    return dict(zip(FIRST, shares, strict=False))


@contextlib.contextmanager
def under_policies(model):
    """The model while its attention obeys a policy: own windows stay in force.

    Raises:
        ValueError: The architecture does not let its attention be replaced, or has
            no full-attention layer.
    """
    attention.register()
    before = model.config._attn_implementation
    model.set_attn_implementation(attention.NAME)
    try:
        attention.inspect(model, list(range(8)))
        yield model
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def perplexity(
    model, tokens: list[int], policy: RetentionPolicy | None, start: int
) -> float:
    """Perplexity of ``tokens[start:]`` under the policy; None: the model as it is.

    Args:
        model: Of :func:`under_policies`, where there is a policy.
    """
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
    """What was measured with one way to begin the text.

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
    """Everything that the summary tells, as plain values.

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
    with under_policies(model):
        policies = {
            size: RetentionPolicy(size, budget - size)
            for size in CANDIDATES
            if size < budget
        }
        perplexities = {
            size: perplexity(model, tokens, policy, budget)
            for size, policy in policies.items()
        }
    full = perplexity(model, tokens, None, budget)
    return {
        "model": name,
        "num_tokens": len(tokens),
        "budget": budget,
        "by_design": weak_sinks.by_design(model.config),
        "sinks": {key: asdict(value) for key, value in sinks.items()},
        "perplexity": perplexities,
        "perplexity_full_attention": full,
        "recommended_num_sink_tokens": recommend(perplexities),
    }


def summary(result: dict[str, Any]) -> str:
    """What it means, in plain words."""
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
    """The words of the command that the advice comes to; W is the plugin's default."""
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
