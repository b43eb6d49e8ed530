"""The soak's server: its processes, their memory, its counters."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

from tests.helpers.server import free_port, post

START_TIMEOUT_S = 600


def segments(processes: Iterable[psutil.Process]) -> set[Path]:
    """The shared memory that they have mapped."""
    found = set()
    for process in processes:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
            found |= {line.split(None, 5)[5] for line in lines if "/dev/shm/" in line}
    return {Path(name) for name in found if not name.endswith("(deleted)")}


class Server:
    """``vllm serve MODEL --attention-backend sink`` in processes of its own.

    Args:
        model: Folder of the model.
        log: Its output goes there.
        flags: Further flags.
        before: Words before the command: ``unshare`` and the like, ended by ``exec``.
        environment: Changes to its environment.

    Attributes:
        tmp: Its TMPDIR, a folder of its own beside the log.
    """

    def __init__(
        self,
        model: str,
        log: Path,
        *flags: str,
        before: Sequence[str] = (),
        **environment: str,
    ) -> None:
        self.tmp = log.with_suffix(".tmp")
        self.tmp.mkdir(exist_ok=True)
        self.segments: set[Path] = set()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        variables = {
            **os.environ,
            "VLLM_PLUGINS": "sink",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_SERVER_DEV_MODE": "1",  # /reset_prefix_cache
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # A worker that is killed for being slow deletes nothing.
            "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "30",
            "TMPDIR": str(self.tmp),
            **environment,
        }
        command = [
            *before,
            sys.executable,
            "-m",
            "vllm.entrypoints.cli.main",
            "serve",
            model,
        ]
        command += ["--attention-backend", "sink", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--dtype", "float32", "--enforce-eager"]
        command += ["--served-model-name", "model", *flags]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env=variables
            )
        self.children: list[psutil.Process] = []

    def wait_ready(self) -> None:
        """Wait until it answers, then watch its children."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(self.url + "/health", timeout=5)
                break
            time.sleep(0.5)
        self.watch(psutil.Process(self.process.pid).children(recursive=True))

    def watch(self, children: list[psutil.Process]) -> None:
        """Processes that must end with it, and whose shared memory must go."""
        self.children += children
        self.segments |= segments([psutil.Process(self.process.pid), *children])

    def stop(self, timeout_s: float = 60) -> int:
        """End it by SIGTERM; its exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(timeout_s)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()

    def left_behind(self, patience_s: float = 10) -> list[str]:
        """What is still there after it ended: children, files, shared memory.

        A child that has ended and whose parent has not asked for its status is not
        there: whose parent died waits for the machine's first process.
        """
        _, alive = psutil.wait_procs(self.children, timeout=patience_s)
        left = []
        for child in alive:
            with contextlib.suppress(psutil.NoSuchProcess):  # zombies, too
                left.append(" ".join(child.cmdline())[:80])
        files = [*self.tmp.iterdir(), *filter(Path.exists, self.segments)]
        return left + sorted(str(file) for file in files)

    def engine_core(self) -> psutil.Process:
        for child in self.children:
            with contextlib.suppress(psutil.Error):
                if "EngineCore" in " ".join(child.cmdline()):
                    return child
        raise AssertionError(f"no engine core among {self.children}")

    def first_error(self) -> str:
        """The engine core's first traceback in the log, else the log's end."""
        lines = self.log.read_text(errors="replace").splitlines()
        core = [line for line in lines if "EngineCore" in line and "ERROR" in line]
        return "\n".join(core[:60] or lines[-40:])

    def resident_mib(self) -> dict[str, float]:
        """Resident memory of each of its processes, MiB."""
        sizes: dict[str, float] = {}
        for process in [psutil.Process(self.process.pid), *self.children]:
            with contextlib.suppress(psutil.Error):
                name = process.name()
                sizes[name] = sizes.get(name, 0) + process.memory_info().rss / 2**20
        return sizes

    def cpu_s(self) -> float:
        """CPU time of its processes so far."""
        total = 0.0
        for process in [psutil.Process(self.process.pid), *self.children]:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def counters(self) -> dict[str, float]:
        """Values of ``/metrics``, summed over their labels."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=30) as page:
            lines = page.read().decode().splitlines()
        values: dict[str, float] = {}
        for line in lines:
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = name.split("{")[0]
                values[name] = values.get(name, 0.0) + float(value)
        return values

    def reset_prefix_cache(self) -> None:
        post(self.url, "/reset_prefix_cache").close()
