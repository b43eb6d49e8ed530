"""``vllm serve`` with all its processes: answers, refuses bad requests, lives on."""

import concurrent.futures
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

START_TIMEOUT_S = 300


@pytest.fixture(scope="module")
def server(model_path, tmp_path_factory):
    """Base URL of a server that was given the flag and nothing of the policy."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {
        **os.environ,
        "VLLM_PLUGINS": "sink",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model_path]
    command += ["--attention-backend", "sink", "--host", "127.0.0.1"]
    # Speed alone: float32 and eager are what this machine runs fastest.
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--served-model-name", "model"]
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment)
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
        yield url, log
    finally:
        process.terminate()
        process.wait(60)


def post(url: str, path: str, **body):
    request = urllib.request.Request(
        url + path,
        json.dumps({"model": "model", **body}).encode(),
        {"Content-Type": "application/json"},
    )
    return urllib.request.urlopen(request, timeout=300)


def answer(url: str, prompt, max_tokens: int = 8) -> str:
    body = post(
        url, "/v1/completions", prompt=prompt, max_tokens=max_tokens, temperature=0
    )
    return json.load(body)["choices"][0]["text"]


def test_log_states_the_policy(server):
    _, log = server
    assert (
        "Sink policy: num_sink_tokens=4 window_size=1024 sink_positions=cache "
        "block_size=128" in log.read_text()
    )


def test_chat(server):
    url, _ = server
    message = {"role": "user", "content": "What is the capital of France?"}
    reply = json.load(
        post(
            url,
            "/v1/chat/completions",
            messages=[message],
            max_tokens=24,
            temperature=0,
        )
    )
    assert "Paris" in reply["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "word " * 20_000, "max_tokens": 1},
        {"prompt": [10**9], "max_tokens": 1},
        {"prompt": "x", "max_tokens": -5},
        {"prompt": "x", "temperature": "hot"},
        {"prompt": []},
    ],
)
def test_bad_requests_get_a_400_and_the_server_lives_on(server, body):
    url, _ = server
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(url, "/v1/completions", **body)
    assert 400 <= caught.value.code < 500
    assert answer(url, "The capital of France is")


def test_odd_prompts(server):
    url, _ = server
    for prompt in ["\x00", "\u202e\U0001f9ff" * 50, " ", "a" * 3000]:
        answer(url, prompt, max_tokens=1)
    assert "Paris" in answer(url, "The capital of France is")


def test_aborted_stream(server):
    url, _ = server
    for _ in range(3):
        stream = post(
            url,
            "/v1/completions",
            prompt="Once upon a time",
            max_tokens=4000,
            stream=True,
            ignore_eos=True,
        )
        stream.readline()
        stream.close()
    assert "Paris" in answer(url, "The capital of France is")


def test_32_clients(server):
    url, _ = server
    prompts = [f"Item {i}: the capital of France is" for i in range(32)]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda prompt: answer(url, prompt), prompts))
    assert all(together)
    assert together[7] == answer(url, prompts[7])
