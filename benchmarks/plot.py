"""The README's pictures, from the committed CSVs alone."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import common

# Told apart without colour by their marks; legible on white and on black pages,
# because the pictures bring their own background.
COLOURS = {"sink": "#0072b2", "stock": "#d55e00"}
MARKS = {"sink": "o", "stock": "s"}
LABELS = {"sink": "sink (4 + 1,024)", "stock": "stock attention"}


def series(rows, engine: str, metric: str):
    """x, y, low, high of one engine's metric, by context."""
    found = sorted(
        (row for row in rows if (row["engine"], row["metric"]) == (engine, metric)),
        key=lambda row: int(row["context"]),
    )
    x = [int(row["context"]) for row in found]
    return x, *([float(row[key]) for row in found] for key in ("value", "p20", "p80"))


def curves(axis, rows, metric: str, title: str, unit: str) -> None:
    for engine in ("stock", "sink"):
        x, y, low, high = series(rows, engine, metric)
        if not x:
            continue
        axis.plot(
            x, y, color=COLOURS[engine], marker=MARKS[engine], label=LABELS[engine]
        )
        axis.fill_between(x, low, high, color=COLOURS[engine], alpha=0.2)
    axis.set_title(title, loc="left", fontsize=11)
    axis.set_xlabel("context, tokens")
    axis.set_ylabel(unit)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(
        lambda x, _: (
            f"{x / 2**20:g}M"
            if x >= 2**20
            else f"{x / 1024:g}k"
            if x >= 1024
            else f"{x:g}"
        )
    )
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def of_one_dtype(rows):
    """The rows of the dtype that is fast on the machine they come from."""
    native = {"avx512_bf16", "amx_bf16", "bf16"}
    flags = (rows[0].get("cpu_flags") or "").split() if rows else []
    wanted = "bfloat16" if native & set(flags) else "float32"
    return [row for row in rows if row["dtype"] == wanted] or rows


def machine_of(rows) -> str:
    row = rows[0]
    dtypes = sorted({row["dtype"] for row in rows})
    cores = f"{row['cores']} core{'s' if row['cores'] != '1' else ''}"
    text = f"{row['model']}, {' and '.join(dtypes)}, {cores} of {row['machine']}"
    flags = row.get("cpu_flags")
    return f"{text} ({flags})" if flags else text


def save(figure, name: str, rows) -> None:
    figure.text(0.01, 0.01, machine_of(rows), fontsize=8, color="#555555")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    path = common.RESULTS / f"{name}.png"
    figure.savefig(path, dpi=120, facecolor="white")
    plt.close(figure)
    print(path.relative_to(common.ROOT))


def stream() -> None:
    rows = of_one_dtype(common.read("stream"))
    if not rows:
        return
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    curves(axes[0], rows, "tpot", "Time per output token", "ms")
    curves(
        axes[1], rows, "kv_blocks", "KV cache of one request", "blocks of 128 tokens"
    )
    curves(axes[2], rows, "ttft", "Time to first token", "s")
    axes[0].legend(frameon=False)
    save(figure, "stream", rows)


def capacity() -> None:
    rows = common.read("capacity")
    if not rows:
        return
    figure, axis = plt.subplots(figsize=(6, 4))
    unit = next(row["unit"] for row in rows if row["metric"] == "concurrency")
    curves(axis, rows, "concurrency", "Requests at once in one KV pool", unit)
    axis.legend(frameon=False)
    save(figure, "capacity", rows)


def million() -> None:
    rows = common.read("million")
    if not rows:
        return
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    curves(axes[0], rows, "chunk", "Prefill of 2,048 tokens", "ms")
    curves(
        axes[1], rows, "kv_blocks", "KV cache of one request", "blocks of 128 tokens"
    )
    ours = [row for row in rows if row["engine"] == "sink"]
    curves(axes[2], ours, "resident", "Memory of the process", "MiB")
    axes[0].legend(frameon=False)
    for axis in axes[:2]:
        axis.set_ylim(auto=True)
        axis.set_yscale("log")
    save(figure, "million", rows)


def peers() -> None:
    rows = common.read("peers")
    if not rows:
        return
    figure, axis = plt.subplots(figsize=(7, 0.6 * len(rows) + 1.4))
    names = [row["engine"] for row in rows]
    values = [float(row["value"]) for row in rows]
    bars = axis.barh(names, values, color="#0072b2")
    axis.bar_label(bars, fmt="%.0f ms", padding=3)
    axis.set_xlabel("ms per output token of an endless stream, median")
    axis.set_xlim(right=1.2 * max(values))
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, "peers", rows)


def chats() -> None:
    rows = common.read("chats")
    if not rows:
        return
    styles = {
        "stock": ("stock attention", COLOURS["stock"], MARKS["stock"]),
        "retention 0": ("sink, vLLM's retention and order", "#56b4e9", "^"),
        "sink": ("sink (4 + 4,092)", COLOURS["sink"], MARKS["sink"]),
        "foresight": ("bound: any order, knowing the day", "#999999", "v"),
    }
    figure, axis = plt.subplots(figsize=(7, 4.4))
    for engine, (label, colour, mark) in styles.items():
        found = sorted(
            (float(row["pool_gib"]), float(row["again_paired"]))
            for row in rows
            if row["engine"] == engine
        )
        if found:
            axis.plot(*zip(*found, strict=True), color=colour, marker=mark, label=label)
    optimum = next(float(row["optimum"]) for row in rows if row["optimum"])
    axis.axhline(optimum, color="#555555", ls=":", label="optimum")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.set_yscale("symlog", linthresh=10)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("KV pool of an 8B model, GiB")
    axis.set_title(
        "Tokens computed again a turn, of turns that stock can serve",
        loc="left",
        fontsize=11,
    )
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    path = common.RESULTS / "chats.png"
    figure.savefig(path, dpi=120, facecolor="white")
    plt.close(figure)
    print(path.relative_to(common.ROOT))


def main() -> None:
    stream()
    capacity()
    million()
    peers()
    chats()


if __name__ == "__main__":
    main()
