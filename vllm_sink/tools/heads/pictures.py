"""Two pictures: the scores of heads, and the needles that a fraction finds."""

from __future__ import annotations

from pathlib import Path

from vllm_sink.tools.heads.fraction import MARGIN, Curve
from vllm_sink.tools.heads.scores import Scores


def _pyplot():
    """Matplotlib, without a screen.

    Raises:
        ImportError: It is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def heat_maps(scores: Scores, kept, path: Path) -> None:
    """Draw maps of layers x KV heads: the measured scores and the chosen heads.

    Args:
        kept: [L, HKV] bool.
    """
    plt = _pyplot()
    panels = {**scores.measured, "score": scores.value}
    width = max(2.2, 0.3 * scores.layers.num_kv_heads)
    height = max(3.0, 0.16 * scores.layers.num_layers)
    figure, axes = plt.subplots(
        1, len(panels), figsize=((width + 0.8) * len(panels), height), squeeze=False
    )
    for panel, (name, values) in zip(axes[0], panels.items(), strict=True):
        image = panel.imshow(values, aspect="auto", cmap="viridis", vmin=0)
        panel.set(title=name, xlabel="KV head")
        panel.set_xticks(range(scores.layers.num_kv_heads))
        figure.colorbar(image, ax=panel, fraction=0.08)
    for layer, head in kept.nonzero().tolist():
        axes[0][-1].plot(head, layer, "o", mfc="none", mec="red", ms=7, mew=1.4)
    axes[0][0].set_ylabel("layer")
    figure.suptitle(f"red: {int(kept.sum())} retrieval heads", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def curve(found: Curve, path: Path) -> None:
    """Answer loss and needles found against the fraction of retrieval heads."""
    plt = _pyplot()
    points = [*found.points, found.full]
    fractions = [100 * point.fraction for point in points]
    figure, axes = plt.subplots(figsize=(6, 3.6))
    axes.plot(fractions, [p.loss for p in points], "o-", color="C0", label="loss")
    axes.axhline(found.full.loss + MARGIN, color="C0", ls=":", lw=1)
    axes.axvline(100 * found.chosen, color="red", lw=1, alpha=0.7)
    axes.set(xlabel="% of KV heads that keep everything", ylim=(0, None))
    axes.set_ylabel("loss of the answers, nats a token", color="C0")
    hits = axes.twinx()
    hits.plot(fractions, [p.hits for p in points], "s--", color="C1", label="found")
    hits.set_ylabel("needles found", color="C1")
    hits.set_ylim(0, 1.02)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.set_title(f"{100 * found.chosen:.0f}% is enough", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
