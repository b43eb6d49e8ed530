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


@pytest.mark.parametrize("options", ["size=8k", "ro"])
def test_no_room_for_the_cache_is_a_warning(options, tmp_path):
    if not shutil.which("unshare") or subprocess.run([*MOUNT, "true"]).returncode:
        pytest.skip("mounts nothing")
    package = Path(vllm_sink_kernels.__file__).parent
    script = (
        # Neither the named folder, nor __pycache__, nor the user's own.
        f"mount -t tmpfs -o {options} tmpfs {tmp_path} && mount --bind {package} "
        f"{package} && mount -o remount,bind,ro {package} && "
        f'export NUMBA_CACHE_DIR={tmp_path} XDG_CACHE_HOME={tmp_path} && exec "$@"'
    )
    run = subprocess.run(
        [*MOUNT, "sh", "-c", script, "sh", sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("compiled\n")
    assert run.stderr.count("NUMBA_CACHE_DIR must be a folder with 8 MiB") == 1
