"""Numba's cache: found by the next process; without a disk for it, compiled anew."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import vllm_sink_kernels
from vllm_sink_kernels.cpu import native

from vllm_sink.attention import cpu

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


def test_processes_that_start_together_compile_once(tmp_path):
    """One compiles, the other waits and finds; Numba itself would do it twice."""
    code = """
import torch
from vllm_sink_kernels.cpu import write
input()  # both have imported
print(write.loop(torch.float32).cache_hits)
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    hits = [process.communicate()[0].split() for process in processes]
    assert sorted(hits) == [["0"], ["1"]]


def test_loops_of_two_dtypes_share_no_file():
    """Numba's index is read and written back: what two processes add, one keeps."""
    _, signature = native.job_type("EmptyJob", "x", "")

    def files(*dtypes):
        @native.compiled(signature, "empty", *dtypes)
        def empty(pointer):
            pass

        assert "_float32" in empty.__qualname__, "what Numba names its files after"
        return empty.__qualname__

    assert len({files(torch.float32), files(torch.float32, torch.float16)}) == 2


@pytest.mark.parametrize("is_found", [True, False])
def test_the_log_says_what_was_compiled_or_found(is_found, monkeypatch):
    def compile_for(*dtypes, on_start):
        if not is_found:
            on_start()
        return not is_found

    said = []
    monkeypatch.setattr(cpu.attention, "compile_for", compile_for)
    monkeypatch.setattr(cpu.logger, "info", lambda line, *x: said.append(line % x))
    cpu._compile_loops.__wrapped__(torch.bfloat16, torch.bfloat16)
    starts = ["Found"] if is_found else ["Compiling", "Compiled"]
    assert [line.split()[0] for line in said] == starts, said
    assert "attention loops for bfloat16" in said[0]
    assert str(native.FOLDER) in said[0] and said[-1].endswith(" s.")
