"""Rows of a measurement on a GPU, written as they come: what ran stays."""

import csv
from pathlib import Path
from typing import Any

from benchmarks.machine import gpu_machine


class RowFile:
    """A CSV that is complete after each row.

    Args:
        stem: Of ``benchmarks/results/STEM_GPU.csv``.
        path: Instead of it.
    """

    def __init__(self, stem: str, path: Path | None = None) -> None:
        self.here = gpu_machine()
        slug = "-".join(self.here["gpu"].lower().split())
        self.path = path or Path(__file__).parent / f"results/{stem}_{slug}.csv"
        self.started = False

    def __call__(self, row: dict[str, Any]) -> None:
        row = row | self.here
        with self.path.open("a" if self.started else "w", newline="") as f:
            writer = csv.DictWriter(f, row, lineterminator="\n")
            if not self.started:
                writer.writeheader()
            writer.writerow(row)
        self.started = True
