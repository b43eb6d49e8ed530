"""Lives of one server: its metrics' folder, the clock, its processes, its disk."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import vllm_sink_kernels

from tests.helpers.server import post
from tests.soak.clients import SoakFailure
from tests.soak.faults import Lives
from tests.soak.run import IDLE_S
from tests.soak.server import Server

CLOCK = Path(__file__).parent / "jumping_clock"
HOUR_S = 3600.0
Seen = Iterator[tuple[str, str]]


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    """The server once it answers; nothing of it stays."""
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()
        shutil.rmtree(server.tmp, ignore_errors=True)


def second_server(lives: Lives) -> Seen:
    """Two on one machine; then its metrics' folder goes; then it is told to end."""
    with running(lives.server("second")) as server:
        sight = lives.load(server.url, 10)
        yield (
            "two servers at once",
            f"{sight}, {_metrics_are_apart(server, lives.main)}",
        )
        (folder,) = server.tmp.glob("vllm-sink-*")
        shutil.rmtree(folder)
        yield "metrics folder deleted", _serves_and_scrapes(lives, server)
        folder.write_text("no folder")
        yield "metrics folder is a file", _serves_and_scrapes(lives, server)
        folder.unlink()
        sight = lives.load_until_told(server.url, server.process.terminate)
        end = lives.check_end(server)
        yield "SIGTERM with requests in flight", f"{sight}, {end}"


def _metrics_are_apart(server: Server, main: Server) -> str:
    """While the other works, this one's counters stand still and nothing is held."""
    names = "vllm:sink_evicted_blocks_total", "vllm:sink_prefix_hits_total"
    deadline = time.monotonic() + IDLE_S
    while (before := server.counters())["vllm:num_requests_running"]:
        if time.monotonic() > deadline:  # clients that hung up
            raise SoakFailure("requests still run long after the load")
        time.sleep(0.5)
    others = main.counters()
    while main.counters()[names[0]] == others[names[0]]:
        if time.monotonic() > deadline:
            raise SoakFailure("the soak's own server does nothing")
        time.sleep(1)
    after = server.counters()
    for name in ("vllm:sink_live_blocks", "vllm:sink_pinned_blocks"):
        if after[name]:
            raise SoakFailure(f"{name} is {after[name]} with nothing running")
    for name in names:
        if after[name] != before[name]:
            raise SoakFailure(f"{name} rose from {before[name]} to {after[name]}")
        if not before[name]:
            raise SoakFailure(f"{name} is 0 after the load")
    return "metrics apart"


def _serves_and_scrapes(lives: Lives, server: Server) -> str:
    sight = lives.load(server.url, 6)
    values = server.counters()  # an HTTP error would be raised
    if not values["vllm:generation_tokens_total"]:
        raise SoakFailure("vLLM's own counters are gone")
    gone = "vllm:sink_evicted_blocks_total" not in values
    return f"{sight}, the policy's counters {'gone' if gone else 'there'}"


def moved_clock(lives: Lives) -> Seen:
    """The wall clock jumps an hour on and two back; then the engine core is killed."""
    clock = lives.file("clock")
    paths = [str(CLOCK), os.environ.get("PYTHONPATH", "")]
    clock.write_bytes(struct.pack("d", 0))
    moved = lives.server(
        "clock",
        PYTHONPATH=os.pathsep.join(filter(None, paths)),
        SOAK_CLOCK=str(clock),
    )
    with running(moved) as server:
        sights = []
        for offset in (HOUR_S, -HOUR_S, 0.0):
            jump = functools.partial(_set, clock, offset)
            sights.append(lives.load(server.url, 8, jump))
            reply = post(server.url, "/v1/completions", prompt=[5], max_tokens=1)
            ahead = json.load(reply)["created"] - time.time()
            if abs(ahead - offset) > 60:
                raise SoakFailure(f"the clock must be {offset} s ahead, it is {ahead}")
        _check_idle(server)
        yield "clock jumps by 1 h, -2 h, 1 h", f"{', '.join(sights)}"
        core = server.engine_core()
        sight = lives.load_until_error(
            server.url, lambda: core.send_signal(signal.SIGKILL)
        )
        end = lives.check_end(server, killed=True)
        yield "engine core killed", f"{sight}, {end}"
    with running(lives.server("fresh")) as server:
        sight = lives.load(server.url, 6)
        server.stop()
        end = lives.check_end(server)
        yield "a fresh server after it", f"{sight}, {end}"


def _set(clock: Path, offset: float) -> None:
    with clock.open("r+b") as file:
        file.write(struct.pack("d", offset))


def _check_idle(server: Server) -> None:
    deadline = time.monotonic() + IDLE_S
    while (values := server.counters())["vllm:num_requests_running"]:
        if time.monotonic() > deadline:
            raise SoakFailure("requests still run long after the load")
        time.sleep(0.5)
    for name in ("vllm:sink_live_blocks", "vllm:kv_cache_usage_perc"):
        if values[name]:
            raise SoakFailure(f"{name} is {values[name]} with nothing running")
    negative = [n for n, v in values.items() if n.startswith("vllm:sink_") and v < 0]
    if negative:
        raise SoakFailure(f"below 0: {negative}")


def full_disk(lives: Lives) -> Seen:
    """Numba's cache and the metrics on a disk without room."""
    folder = lives.file("full")
    folder.mkdir()
    # A mount that only the server sees; it is gone with it.
    script = f"mount -t tmpfs -o size=64k tmpfs {folder} && "
    script += f"(head -c 64k /dev/zero > {folder}/zeros; true) 2>/dev/null && "
    yield "cache disk full", _own_mounts(lives, "full", script, folder)


def read_only_disk(lives: Lives) -> Seen:
    """No place for Numba's cache: its folder, the package's and HOME read-only."""
    folder = lives.file("read-only")
    folder.mkdir()
    kernels = Path(vllm_sink_kernels.__file__).parent
    script = f"mount -t tmpfs -o ro,size=64k tmpfs {folder} && "
    script += f"mount --bind {kernels} {kernels} && "
    script += f"mount -o remount,ro,bind {kernels} && "
    yield "cache disk read-only", _own_mounts(lives, "read-only", script, folder)


def _own_mounts(lives: Lives, name: str, script: str, folder: Path) -> str:
    server = lives.server(
        name,
        before=["unshare", "--mount", "sh", "-c", script + 'exec "$0" "$@"'],
        NUMBA_CACHE_DIR=str(folder),
        XDG_CACHE_HOME=str(folder),
    )
    with running(server):
        sight = lives.load(server.url, 8)
        server.stop()
        end = lives.check_end(server)
    said = [
        line for line in server.log.read_text().splitlines() if "NUMBA_CACHE" in line
    ]
    if not said:
        raise SoakFailure("the log doesn't say that nothing is cached")
    return f"{sight}, {end}"
