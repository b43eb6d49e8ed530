"""Find a model's retrieval heads and how many of them it needs.

    vllm-sink heads --model M [--text FILE] [--out heads.tsv] [--fraction auto|F]

Scores every KV head, writes a pattern file that ``sink.retrieval_heads`` reads, and
says in plain words what was found. Without --text the prose that Python carries is
read.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from vllm_sink.policy.config import SinkConfig
from vllm_sink.policy.head_map import FACTS
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.tools import serve_command
from vllm_sink.tools.cli import print_json
from vllm_sink.tools.heads import (
    answers,
    attention,
    duo,
    fraction,
    needles,
    pattern,
    pictures,
    texts,
)
from vllm_sink.tools.heads import scores as recipe

NUM_HAYSTACKS = 5


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``vllm-sink heads``."""
    parser.description = __doc__
    parser.epilog = "example: vllm-sink heads --model Qwen/Qwen3-8B --out heads.tsv"
    add = parser.add_argument
    add("--model", required=True, help="folder or Hub name")
    add("--revision", help="of the model on the Hub")
    add("--text", type=Path, help="prose to read, UTF-8 (Python's own reference)")
    add("--out", type=Path, default=Path("heads.tsv"), help="pattern file (heads.tsv)")
    add(
        "--fraction",
        type=_fraction,
        default="auto",
        help="of the KV heads, 0 to 1; auto: the smallest that answers as well as full "
        "attention (auto)",
    )
    add(
        "--method",
        choices=("answers", "recipe", "duo"),
        default="answers",
        help="answers: gates trained on needles; recipe: attention to what was read "
        "before, seconds, for a model that finds no needles; duo: DuoAttention's "
        "gates, minutes (answers)",
    )
    add(
        "--steps",
        type=int,
        help=f"of answers ({answers.STEPS}) and duo ({duo.STEPS})",
    )
    add("--num-sink-tokens", type=int, default=4, help="S while needles are sought (4)")
    add("--window-size", type=int, default=252, help="and W (252)")
    add("--needle-tokens", type=int, default=512, help="of a haystack (512)")
    add(
        "--haystacks",
        type=int,
        default=NUM_HAYSTACKS,
        help=f"of eight needles each, for auto ({NUM_HAYSTACKS})",
    )
    add("--dtype", default="auto", help="the checkpoint's own; float32, bfloat16 ...")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 ... (cpu)")


def _fraction(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(
            f"must be auto or a number from 0 to 1, got {text!r}"
        )
    return value


def run(args: argparse.Namespace) -> int:
    """Find, write, report; 0 when all is written.

    Raises:
        ValueError: The model, the text or a size is not fit for it.
    """
    if args.steps is not None and args.steps < 1:
        raise ValueError(
            f"--steps must be at least 1, got {args.steps}; leave it out for the "
            "method's own"
        )
    policy = RetentionPolicy(args.num_sink_tokens, args.window_size)
    pictured = [
        args.out.with_suffix(".png"),
        args.out.with_name(f"{args.out.stem}_curve.png"),
    ]
    pattern.refuse_unwritable(args.out, pictured)
    text = texts.read(args.text)
    with _Progress(quiet=args.json) as progress:
        with progress.step("reading the model", 1) as advance:
            model, tokenizer = attention.load(
                args.model,
                dtype=args.dtype,
                device=args.device,
                revision=args.revision,
            )
            sample = texts.encode(tokenizer, text.content[:200])
            layers = attention.inspect(model, sample)
            advance()
        # First, as sizes that don't fit are refused here.
        haystacks = [
            needles.make(
                tokenizer, text.held_out, args.needle_tokens, args.window_size, index
            )
            for index in range(args.haystacks if args.fraction == "auto" else 0)
        ]
        scores = _score(args, model, tokenizer, text, layers, policy, progress)
        found = None
        if haystacks:
            found = _measure(model, haystacks, scores, policy, progress)
    share = found.chosen if found else args.fraction
    kept = fraction.best_heads(scores, share)
    config = _config(args, model, text, scores, kept, found)
    beside = pattern.write(args.out, scores.value, config, pictured)
    drawn, missing = _draw(pictured, scores, kept, found)
    if args.json:
        files = [str(path) for path in (args.out, beside, *drawn)]
        report = {
            **config,
            "files": files,
            "heads": [list(head) for head in kept.nonzero().tolist()],
            "scores": scores.value.tolist(),
            "measured": {k: v.tolist() for k, v in scores.measured.items()},
        }
        print_json(report)
    else:
        print(summary(args, scores, kept, found, [args.out, beside, *drawn]))
    if missing:
        print(missing, file=sys.stderr)
    if not args.json:
        sys.stdout.flush()
        del model, tokenizer  # the start that is asked for takes their room
        section = {"retrieval_heads": str(args.out)}
        command = serve_command.serve_command(args.model, section, args.revision)
        introduction = f"Serve with them (the fraction is in {beside.name}):"
        print("\n".join(serve_command.advice(introduction, command)))
    return 0


def _score(args, model, tokenizer, text, layers, policy, progress) -> recipe.Scores:
    if args.method == "recipe":
        with progress.step("scoring the heads", recipe.NUM_PASSAGES) as advance:
            return recipe.find(model, tokenizer, text.calibration, layers, advance)
    method = {"answers": answers, "duo": duo}[args.method]
    steps = method.STEPS if args.steps is None else args.steps
    with progress.step("training the gates", steps) as advance:
        return method.find(
            model,
            tokenizer,
            text.calibration,
            layers,
            policy,
            args.needle_tokens,
            steps=steps,
            on_progress=advance,
        )


def _measure(model, haystacks, scores, policy, progress) -> fraction.Curve:
    tried = fraction.FRACTIONS
    with progress.step("hiding needles", len(haystacks) * (len(tried) + 1)) as advance:
        return fraction.measure(model, haystacks, scores, policy, tried, advance)


def _config(args, model, text, scores, kept, found) -> dict[str, Any]:
    """The JSON beside the pattern: facts that a reader and its users need."""
    text_config = model.config.get_text_config()
    # As the plugin counts: rows of layers without a choice are in no fraction.
    share = int(kept.sum()) / scores.layers.num_heads
    return {
        "sink_size": args.num_sink_tokens,
        "recent_size": args.window_size,
        "retrieval_fraction": round(share, 6),
        "model": args.model,
        "revision": args.revision or getattr(model.config, "_commit_hash", None),
        **{name: getattr(text_config, name, None) for name in FACTS},
        "text": text.name,
        "text_sha256": text.digest,
        "method": args.method,
        "needle_tokens": args.needle_tokens if found else None,
        "curve": found.as_dict() if found else None,
    }


def _draw(paths: list[Path], scores, kept, found) -> tuple[list[Path], str]:
    """Paths of the drawn pictures, and a message if none could be drawn."""
    heat_maps, curve = paths
    try:
        pictures.heat_maps(scores, kept, heat_maps)
        if found:
            pictures.curve(found, curve)
    except ImportError:
        return [], "the pictures need matplotlib: pip install 'vllm-sink[eval]'"
    return paths if found else [heat_maps], ""


def summary(args, scores, kept, found, files) -> str:
    """The result in plain words."""
    layers, count = scores.layers, int(kept.sum())
    total = layers.num_heads
    by_layer = kept.sum(1)
    most = int(by_layer.argmax())
    best = ", ".join(f"layer {i} head {h}" for i, h in scores.order()[:4])
    share = count / total
    lines = [
        f"{args.model}: {len(layers.full)} full-attention layers x "
        f"{layers.num_kv_heads} KV heads = {total} heads.",
        f"{count} of them ({share:.0%}) are retrieval heads: they keep everything, the "
        "others the sinks and the window.",
        f"They sit in {int((by_layer > 0).sum())} layers, most in layer {most} "
        f"({int(by_layer[most])}); the best: {best}.",
    ]
    if found is not None:
        lines += [
            "",
            f"{args.needle_tokens}-token haystacks, S + W = "
            f"{args.num_sink_tokens} + {args.window_size}:",
        ]
        lines.append("  heads     %   loss of the answers   needles found")
        lines += [
            f"  {p.num_heads:5d}  {p.fraction:4.0%}   {p.loss:19.2f}   {p.hits:13.0%}"
            + ("   <- chosen" if p.fraction == found.chosen else "")
            for p in [*found.points, found.full]
        ]
        lines.append(f"Chosen: {found.why}.")
    budget = SinkConfig().policy.budget
    memory = [
        f"{share + (1 - share) * min(1, budget / tokens):.0%} at {tokens:,} tokens"
        for tokens in (8_192, 32_768, 131_072)
    ]
    lines += [
        "",
        f"KV memory against full attention with the default S + W = {budget:,}: "
        f"{', '.join(memory)}.",
        f"Written: {', '.join(str(path) for path in files)}",
    ]
    return "\n".join(lines)


class _Progress:
    """Progress bars on the terminal; none without ``rich``, or for JSON."""

    def __init__(self, *, quiet: bool) -> None:
        self._bars: Any = None
        if quiet:
            return
        try:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
            )
        except ImportError:
            return
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )

    def __enter__(self) -> _Progress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bars is not None:
            self._bars.stop()

    @contextlib.contextmanager
    def step(self, what: str, total: int):
        """A bar; yields the function that moves it on."""
        if self._bars is None:
            yield lambda: None
            return
        bar = self._bars.add_task(what, total=total)
        yield lambda: self._bars.advance(bar)
