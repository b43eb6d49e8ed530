"""Lives on Ray: a worker is killed under a server, a replica under Ray Serve."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.helpers.ray_nodes import NODE, SETTINGS
from tests.helpers.server import free_port
from tests.soak.clients import SoakFailure
from tests.soak.fault_servers import Seen, running
from tests.soak.faults import Lives
from tests.soak.server import START_TIMEOUT_S

# The engine's arguments of the soak's flags, for Ray Serve.
ENGINE = {
    "max_model_len": 1024,
    "block_size": 16,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 24,
    "num_gpu_blocks_override": 220,
    "scheduling_policy": "priority",
    "additional_config": {"sink": {"num_sink_tokens": 4, "window_size": 124}},
}
# Ray's workers are nice by 15: beside a loaded server on one core they would starve.
NICE = {"RAY_worker_niceness": "0"}
REPLICA = "ServeReplica:llm:LLMServer"


@contextlib.contextmanager
def ray_process(log: Path, *arguments: str) -> Iterator[tuple[psutil.Process, str]]:
    """A Python process that holds a Ray, and its first line; ended with all its own."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **SETTINGS, **NICE},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdin and process.stdout
    watched = psutil.Process(process.pid)
    too_late = threading.Timer(2 * START_TIMEOUT_S, process.kill)
    too_late.start()
    try:
        line = ""
        for line in process.stdout:  # Ray prints to it, too
            if line.startswith(("ready", "127.")):
                break
        else:
            raise SoakFailure(f"no Ray: {log.read_text()[-3000:]}")
        too_late.cancel()
        yield watched, line.strip()
    finally:
        too_late.cancel()
        family = []
        with contextlib.suppress(psutil.Error):
            family = watched.children(recursive=True)
        process.stdin.close()
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
            raise SoakFailure("Ray's process did not end") from None
        _, alive = psutil.wait_procs(family, timeout=20)
        names = [" ".join(child.cmdline())[:80] for child in alive]
        for child in alive:
            child.kill()
    if names:
        raise SoakFailure(f"left behind: {names}")


def named(parent: psutil.Process, name: str) -> list[psutil.Process]:
    """Its descendants whose title holds the name, the oldest first."""
    found = []
    for child in parent.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if name in " ".join(child.cmdline()):
                found.append(child)
    return sorted(found, key=lambda child: child.create_time())


def cluster(lives: Lives) -> Seen:
    """Tensor parallel over two Ray workers; one is killed, a fresh server follows."""
    flags = ["--distributed-executor-backend", "ray", "--tensor-parallel-size", "2"]
    with ray_process(lives.file("node.log"), "-c", NODE, "3") as (node, address):
        settings = {**SETTINGS, "RAY_ADDRESS": address}
        with running(lives.server("worker", *flags, **settings)) as server:
            lives.load(server.url, 8)
            workers = named(node, "RayWorkerProc")
            server.watch(workers)
            worker = workers[-1]
            sight = lives.load_until_error(server.url, worker.kill)
            end = lives.check_end(server, killed=True)
            yield "Ray worker killed", f"{sight}, {end}"
        with running(lives.server("worker-fresh", *flags, **settings)) as server:
            sight = lives.load(server.url, 6)
            server.stop()
            end = lives.check_end(server)
            yield "a fresh server on the same Ray", f"{sight}, {end}"


def deployment(lives: Lives) -> Seen:
    """Ray Serve's two replicas; one is killed, the other answers, a third comes."""
    port = str(free_port())
    url = f"http://127.0.0.1:{port}"
    arguments = "-m", "tests.soak.ray_app", lives.model, port, json.dumps(ENGINE)
    with ray_process(lives.file("app.log"), *arguments) as (app, _):
        lives.load(url, 8, cards=lives.good)
        before = named(app, REPLICA)
        if len(before) != 2:
            raise SoakFailure(f"must be two replicas, got {before}")
        killed = before[0]
        cut = lives.load_around(url, 45, killed.kill)
        start = time.monotonic()
        while len(now := [p for p in named(app, REPLICA) if p != killed]) < 2:
            if time.monotonic() - start > START_TIMEOUT_S:
                raise SoakFailure(f"no new replica, only {now}")
            time.sleep(1)
        sight = lives.load(url, 10, cards=lives.good)
        back = f"the next process {time.monotonic() - start:.0f} s later, {sight}"
        yield "Ray replica killed", f"{cut}, {back}"
