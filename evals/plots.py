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
    axes.set_xticks(sorted({first for first, _ in points}))
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis("{x:.0f}")
    axes.tick_params(which="both", labelsize=8)
    axes.grid(which="both", **GRID)
    axes.legend(fontsize=8)
    save(figure, png_path)


def attention_by_layer(csv_path: Path, png_path: Path) -> None:
    """A bar a layer, the mean of its heads; a dot a head."""
    heads = defaultdict(list)
    for row in read(csv_path):
        heads[int(row["layer"])].append(float(row["first_token_share"]))
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.bar(list(heads), [sum(h) / len(h) for h in heads.values()], alpha=0.5)
    dots = [(layer, value) for layer, values in heads.items() for value in values]
    axes.scatter(*zip(*dots, strict=True), s=6, color="black")
    axes.set(xlabel="layer", ylabel="attention to the first token", ylim=(0, 1))
    axes.grid(**GRID)
    save(figure, png_path)


def change_by_layer(csv_path: Path, png_path: Path) -> None:
    """A line a condition: the mean relative change after each layer."""
    curves = defaultdict(list)
    for row in read(csv_path):
        point = (int(row["after_layer"]), float(row["mean_relative_change"]))
        curves[row["condition"]].append(point)
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", ms=3, label=name)
    axes.set(xlabel="after layer", ylabel="relative change of later tokens")
    axes.grid(**GRID)
    axes.legend(fontsize=8)
    save(figure, png_path)


STYLES = {"found": ("C0", "o-"), "whole layers": ("C1", "s--"), "random": ("C3", "x:")}


def needles_by_memory(csv_path: Path, png_path: Path) -> None:
    """A panel a length: needles kept of full attention's, against KV memory."""
    rows = read(csv_path)
    lengths = sorted({int(row["length"]) for row in rows})
    figure, panels = plt.subplots(
        1, len(lengths), figsize=(3.8 * len(lengths), 3.5), sharey=True, squeeze=False
    )
    for axes, length in zip(panels[0], lengths, strict=True):
        here = [row for row in rows if int(row["length"]) == length]
        full = max(int(row["hits"]) for row in here if float(row["fraction"]) == 1)
        for name, (color, style) in STYLES.items():
            points = sorted(
                (float(r["kv_share"]), int(r["hits"]) / full, float(r["fraction"]))
                for r in here
                if r["heads"] == name
            )
            if not points:
                continue
            x, y, shares = zip(*points, strict=True)
            axes.plot(x, y, style, color=color, ms=5, label=f"{name} heads")
            if name == "found":
                for point in zip(x, y, shares, strict=True):
                    text = "streaming" if point[2] == 0 else f"{point[2]:.0%}"
                    place = {"textcoords": "offset points", "ha": "right", "size": 7}
                    axes.annotate(text, point[:2], (-4, 5), **place)
        axes.set(xlim=(0, 1.05), ylim=(-0.05, 1.1), title=f"{length:,} tokens")
        axes.set_xlabel("KV memory / full attention's")
        axes.grid(**GRID)
    panels[0][0].set_ylabel("needles found / full attention's")
    handles, labels = panels[0][0].get_legend_handles_labels()
    labels = [label.replace("layers heads", "layers") for label in labels]
    figure.tight_layout()
    figure.legend(
        handles,
        labels,
        fontsize=8,
        ncols=3,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
    )
    figure.savefig(png_path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def needles_by_method(csv_path: Path, png_path: Path) -> None:
    """A line a method: needles found, against KV memory; this project's in bold."""
    rows = read(csv_path)
    total = int(rows[0]["num_needles"])
    lines = defaultdict(list)
    full = {"hits": 0}
    for row in rows:
        own = row["program"] == "vLLM"
        if row["method"] == "full attention":
            full = row
            if not own:
                continue
        name = "vLLM-Sink" if own else row["method"]
        lines[name].append((float(row["kv_share"]), int(row["hits"])))
    figure, axes = plt.subplots(figsize=(7, 4))
    for name in sorted(lines, key=lambda name: -max(y for _, y in lines[name])):
        style = {"lw": 1.2, "ms": 4}
        if name == "vLLM-Sink":
            style = {"lw": 3, "ms": 7, "color": "black", "zorder": 3}
        points = sorted(lines[name])
        axes.plot(*zip(*points, strict=True), marker="o", label=name, **style)
    axes.axhline(int(full["hits"]), color="grey", ls=":", lw=1, label="full attention")
    axes.set(xlim=(0, 1.03), ylim=(-2, total), xlabel="KV memory / full attention's")
    axes.set_ylabel(f"needles found of {total}")
    axes.grid(**GRID)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, png_path)


def perplexity_by_fraction(csv_path: Path, png_path: Path) -> None:
    """A line a way to choose the heads: perplexity over the texts."""
    curves = defaultdict(lambda: defaultdict(list))
    for row in read(csv_path):
        nll = float(row["mean_nll"])
        curves[row["heads"]][100 * float(row["fraction"])].append(nll)
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for name, by_share in curves.items():
        points = [
            (share, math.exp(sum(nlls) / len(nlls)))
            for share, nlls in sorted(by_share.items())
        ]
        color, style = STYLES[name]
        axes.plot(*zip(*points, strict=True), style, color=color, ms=5, label=name)
    axes.set(xlabel="% of KV heads that keep everything", ylabel="perplexity")
    axes.grid(**GRID)
    axes.legend(fontsize=8)
    save(figure, png_path)


def of_parts(parts: list[dict], out: Path) -> None:
    """Draw a picture for each task of ``evals.run``'s results, by its samples' keys."""
    by_task = defaultdict(list)
    for part in parts:
        by_task[part["task"]].append(part)
    for task, group in by_task.items():
        samples = group[0]["samples"]
        path = out / f"{task}.png"
        if {"end", "num_tokens"} <= samples[0].keys():
            _lines(group, path, "end", "tokens", "perplexity", _perplexity)
        elif "distance" in samples[0]:
            _lines(group, path, "distance", "tokens back", "accuracy", _accuracy)
        elif "depth" in samples[0]:
            _heat_maps(group, path)
        elif "length" in samples[0] and "acc" in samples[0]:
            _lines(group, path, "length", "tokens", "accuracy", _accuracy)


def _perplexity(samples: list[dict]) -> float:
    tokens = sum(sample["num_tokens"] for sample in samples)
    return math.exp(-sum(sample["response"][0] for sample in samples) / tokens)


def _accuracy(samples: list[dict]) -> float:
    return sum(sample["acc"] for sample in samples) / len(samples)


def _lines(parts, path: Path, key: str, x: str, y: str, value) -> None:
    """A line a policy: ``value`` of the samples with equal ``key``."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for part in parts:
        groups = defaultdict(list)
        for sample in part["samples"]:
            groups[sample[key]].append(sample)
        points = [(place, value(groups[place])) for place in sorted(groups)]
        name = part["config"]["policy"]["name"]
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, label=name)
    axes.set(title=parts[0]["task"], xlabel=x, ylabel=y)
    if y == "accuracy":
        axes.set_ylim(-0.05, 1.05)
    axes.grid(**GRID)
    axes.legend(fontsize=8)
    save(figure, path)


def _heat_maps(parts, path: Path) -> None:
    """A panel a policy: accuracy by length and depth."""
    figure, panels = plt.subplots(
        1, len(parts), figsize=(3.4 * len(parts), 3.2), squeeze=False
    )
    samples = parts[0]["samples"]
    lengths = sorted({sample["length"] for sample in samples})
    depths = sorted({sample["depth"] for sample in samples})
    for axes, part in zip(panels[0], parts, strict=True):
        cells = defaultdict(list)
        for sample in part["samples"]:
            cells[sample["depth"], sample["length"]].append(sample)
        grid = [
            [_accuracy(cells[d, n]) if cells[d, n] else math.nan for n in lengths]
            for d in depths
        ]
        axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(lengths)), lengths, fontsize=7, rotation=45)
        axes.set_yticks(range(len(depths)), [f"{d}%" for d in depths], fontsize=7)
        axes.set_title(part["config"]["policy"]["name"], fontsize=9)
        axes.set_xlabel("tokens", fontsize=8)
    panels[0][0].set_ylabel("depth", fontsize=8)
    figure.suptitle(parts[0]["task"], fontsize=10)
    save(figure, path)
