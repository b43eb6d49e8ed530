"""``vllm serve`` with all its processes: answers, refuses bad requests, lives on."""

import concurrent.futures
import json
import urllib.error
import urllib.request

import pytest

from tests.helpers.server import post, serve


@pytest.fixture(scope="module")
def server(model_path, tmp_path_factory):
    """Base URL of a server whose window is short enough to leave it soon."""
    log = tmp_path_factory.mktemp("server") / "log"
    policy = {"sink": {"num_sink_tokens": 4, "window_size": 1024}}
    with serve(model_path, log, "--additional-config", json.dumps(policy)) as url:
        yield url, log


def answer(url: str, prompt, max_tokens: int = 8) -> str:
    body = post(
        url, "/v1/completions", prompt=prompt, max_tokens=max_tokens, temperature=0
    )
    return json.load(body)["choices"][0]["text"]


def test_log_states_the_policy(server):
    _, log = server
    assert (
        "Sink policy: each token sees the first 4 and the last 1,024 tokens; a "
        "request takes at most" in log.read_text()
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


def scrape(url: str) -> dict[str, float]:
    """Values of ``/metrics``, labels dropped."""
    with urllib.request.urlopen(url + "/metrics", timeout=30) as page:
        lines = page.read().decode().splitlines()
    rows = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name.split("{")[0]: float(value) for name, value in rows}


def test_policy_counters_beside_vllms_own(server):
    """Past S + W = 1,028 tokens blocks are evicted; the second time sinks hit."""
    url, _ = server
    before = scrape(url)
    prompt = "A lighthouse stands on the rock and its lamp turns. " * 160
    answer(url, prompt)
    once = scrape(url)
    answer(url, prompt)
    twice = scrape(url)
    assert once["vllm:sink_evicted_blocks_total"] > before.get(
        "vllm:sink_evicted_blocks_total", 0
    )
    hits, tokens = "vllm:sink_prefix_hits_total", "vllm:sink_prefix_hit_tokens_total"
    assert twice[hits] == once[hits] + 1
    assert twice[tokens] - once[tokens] > 1028
    own = "vllm:prefix_cache_hits_total"
    assert twice[own] - once[own] == twice[tokens] - once[tokens]
    for name in ("vllm:sink_live_blocks", "vllm:sink_pinned_blocks"):
        assert twice[name] == 0, "nothing runs"
    # While a request runs, its sinks are pinned.
    stream = post(
        url,
        "/v1/completions",
        prompt=prompt,
        max_tokens=200,
        stream=True,
        ignore_eos=True,
    )
    stream.readline()
    running = scrape(url)
    stream.close()
    assert running["vllm:sink_pinned_blocks"] == 1  # ceil(4 / 128)
    assert 1 < running["vllm:sink_live_blocks"] <= 1 + 16 + 1 + 16
