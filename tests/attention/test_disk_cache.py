"""Numba's cache on a disk that is full or read-only: the loops are compiled anew."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import vllm_sink_kernels

COMPILE = """
import torch
from vllm_sink_kernels.cpu import write
write.loop(torch.float32)
print("compiled")
"""
MOUNT = ["unshare", "--user", "--map-root-user", "--mount"]


def compile_where(folder: Path, options: str, numba_cache: Path):
    """Neither ``__pycache__`` nor the user's cache can be written.

    Args:
        folder: Gets a tmpfs of the options and is the user's cache.
    """
    if not shutil.which("unshare") or subprocess.run([*MOUNT, "true"]).returncode:
        pytest.skip("mounts nothing")
    package = Path(vllm_sink_kernels.__file__).parent
    script = (
        f"mount -t tmpfs -o {options} tmpfs {folder} && mount --bind {package} "
        f"{package} && mount -o remount,bind,ro {package} && "
        f'export NUMBA_CACHE_DIR={numba_cache} XDG_CACHE_HOME={folder} && exec "$@"'
    )
    run = subprocess.run(
        [*MOUNT, "sh", "-c", script, "sh", sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("compiled\n")
    return run.stderr


@pytest.mark.parametrize("options", ["size=8k", "ro"])
def test_no_room_for_the_cache_is_a_warning(options, tmp_path):
    said = compile_where(tmp_path, options, tmp_path)
    assert said.count("NUMBA_CACHE_DIR must be a folder with 8 MiB") == 1


def test_the_folder_that_the_warning_asks_for_is_enough(tmp_path):
    (tmp_path / "disk").mkdir()
    said = compile_where(tmp_path / "disk", "ro", tmp_path / "cache")
    assert "NUMBA_CACHE_DIR" not in said
    assert list((tmp_path / "cache").rglob("*.nbc"))
