"""Counters of the policy on the server's ``/metrics``, beside vLLM's own.

The block manager lives in the engine core's process, ``/metrics`` in the API
server's. Both are on one machine and share an environment variable that names
a folder: the manager keeps its counters in prometheus_client's memory-mapped
files there (one write per change, no call between the processes), the server's
registry has a collector that reads them when scraped. With several API servers
vLLM itself uses such files: then they go into its folder and vLLM reads them.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator

from vllm.logger import init_logger

FOLDER_VARIABLE = "VLLM_SINK_METRICS_DIR"
VLLM_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

COUNTERS = {
    "vllm:sink_evicted_blocks": "Gap blocks evicted from running requests.",
    "vllm:sink_prefix_hits": "Requests that adopted cached sinks and window.",
    "vllm:sink_prefix_hit_tokens": "Tokens that those requests did not compute.",
    "vllm:sink_host_stored_blocks": "Blocks copied to host memory.",
    "vllm:sink_host_stored_bytes": "Their bytes, of all workers.",
    "vllm:sink_host_hits": "Requests whose sinks or window came from host memory.",
    "vllm:sink_host_hit_tokens": "Tokens that those requests did not compute.",
    "vllm:sink_host_loaded_blocks": "Blocks copied from host memory.",
    "vllm:sink_host_loaded_bytes": "Their bytes, of all workers.",
}
GAUGES = {
    "vllm:sink_live_blocks": "Blocks that requests hold, shared ones once; with "
    "retrieval heads those of the others.",
    "vllm:sink_retrieval_blocks": "Blocks that requests hold for retrieval heads.",
    "vllm:sink_pinned_blocks": "Sink blocks among them: never evicted.",
    "vllm:sink_host_blocks": "Blocks that lie in host memory.",
}
FILE_BYTES = 1 << 16  # more than the names above take

logger = init_logger("vllm.plugins.sink")


@functools.cache
def register_collector() -> None:
    """Name the folder of a server's counters, and read it on every scrape.

    Called wherever the plugin loads. The process that ``multiprocessing`` didn't
    start is the server (or the user's own): its children inherit the variable. A
    server that a process with the plugin launches gets a folder of its own. Nothing
    is created here.
    """
    if multiprocessing.parent_process() is not None:
        return
    from prometheus_client import REGISTRY

    folder = os.path.join(
        tempfile.gettempdir(), f"vllm-sink-{os.getpid()}-{os.urandom(4).hex()}"
    )
    os.environ[FOLDER_VARIABLE] = folder
    REGISTRY.register(_FolderCollector(folder))
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a forked child
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)


class _FolderCollector:
    """A collector of the metrics of all engine cores, summed."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def describe(self) -> list:
        return []  # a custom collector's names: none to check at registration

    def collect(self) -> Iterator:
        from prometheus_client.multiprocess import MultiProcessCollector

        if os.path.isdir(self.folder):
            yield from MultiProcessCollector(None, self.folder).collect()


class SinkMetrics:
    """The metrics of this process; :meth:`add` is the only operation."""

    def __init__(self, folder: str) -> None:
        from prometheus_client.mmap_dict import MmapedDict, mmap_key

        os.makedirs(folder, mode=0o700, exist_ok=True)
        unique = f"sink{os.getpid()}.db"  # prometheus_client's own have the pid
        counters = MmapedDict(_with_room(folder, f"counter_{unique}"))
        gauges = MmapedDict(_with_room(folder, f"gauge_sum_{unique}"))
        self._values: dict[str, float] = {}
        self._places = {}
        for name, text in COUNTERS.items():
            key = mmap_key(name, f"{name}_total", [], [], text)
            self._places[name] = (counters, key)
        for name, text in GAUGES.items():
            self._places[name] = (gauges, mmap_key(name, name, [], [], text))
        for name in self._places:
            self.add(name, 0)

    def add(self, name: str, amount: int) -> None:
        value = self._values.get(name, 0) + amount
        self._values[name] = value
        file, key = self._places[name]
        file.write_value(key, value, 0.0)


def _with_room(folder: str, name: str) -> str:
    """Reserve the disk's room for a file of metrics.

    prometheus_client makes it sparse and maps it: the first write to a page that a
    full disk has no room for would end the engine core with SIGBUS.
    """
    path = os.path.join(folder, name)
    try:
        with open(path, "ab") as file:
            file.write(bytes(max(0, FILE_BYTES - file.tell())))
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path)  # a scrape can't read half of one
        raise
    return path


def metrics() -> SinkMetrics | None:
    """This process's metrics; None where no folder reached it (a Ray worker).

    None, too, where the folder can't be written: serving is worth more than counters.
    """
    folder = os.environ.get(VLLM_FOLDER_VARIABLE) or os.environ.get(FOLDER_VARIABLE)
    return None if folder is None else _metrics_in(folder, os.getpid())


@functools.cache
def _metrics_in(folder: str, pid: int) -> SinkMetrics | None:
    """The metrics of a process, by its pid: a forked child has files of its own."""
    try:
        return SinkMetrics(folder)
    except OSError as error:
        logger.warning(
            "TMPDIR (or %s, where it is set) must be a folder with room for the "
            "policy's counters, got %s; /metrics is without them until the server "
            "is started with one",
            VLLM_FOLDER_VARIABLE,
            error,
        )
        return None
