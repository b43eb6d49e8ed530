"""``vllm serve`` with all its processes, on the loopback interface."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

START_TIMEOUT_S = 300


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serve(model: str, log: Path, *flags: str, **environment: str):
    """The base URL of a server under the policy; its output goes to ``log``."""
    port = free_port()
    variables = {
        **os.environ,
        "VLLM_PLUGINS": "sink",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        **environment,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    command += ["--attention-backend", "sink", "--host", "127.0.0.1"]
    # Speed alone: float32 and eager are what this machine runs fastest.
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--served-model-name", "model", *flags]
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=variables)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(url + "/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def post(url: str, path: str, **body):
    """The open response of a JSON request to the model, past any proxy."""
    request = urllib.request.Request(
        url + path,
        json.dumps({"model": "model", **body}).encode(),
        {"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(request, timeout=120)
