"""scripts/gpu_check.py runs; without a GPU, its correctness part."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts/gpu_check.py"


def test_correctness_part_passes_under_the_interpreter():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--interpret", "--quick"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(", 0 failed") == 2, done.stdout  # kernels and engine
