"""The pictures, each drawn from the CSV that holds its numbers."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GRID = {"alpha": 0.3, "linewidth": 0.5}


def read(path: Path) -> list[dict[str, str]]:
    """The CSV's rows."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def save(figure, path: Path) -> None:
    """Write the PNG and forget the figure."""
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def perplexity_by_position(csv_path: Path, png_path: Path) -> None:
    """A line a policy: perplexity of each segment."""
    curves = defaultdict(list)
    for row in read(csv_path):
        curves[row["policy"]].append(
            (int(row["first_token"]), math.exp(float(row["mean_nll"])))
        )
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", ms=3, label=name)
    axes.set(xlabel="first token of the segment", ylabel="perplexity", yscale="log")
    axes.grid(which="both", **GRID)
    axes.legend(fontsize=8)
    save(figure, png_path)
