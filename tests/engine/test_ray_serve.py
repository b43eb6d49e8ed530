"""The Serve config that ships, on two CPU replicas: answers, fails, recovers."""

import asyncio
import contextlib
import copy
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("ray", reason="needs the extra: pip install 'vllm-sink[ray]'")
import ray
from ray import serve

from scripts.serve_ray import deploy, read_config
from tests.helpers.ray_nodes import INIT, SETTINGS
from tests.helpers.server import free_port, post

CONFIG = Path(__file__).parents[2] / "scripts" / "serve_ray.yaml"
QUESTION = {"role": "user", "content": "What is the capital of France?"}


@pytest.fixture(scope="module")
def config(model_path):
    config = read_config(CONFIG, model_path)
    config["http_options"]["port"] = free_port()
    (application,) = config["applications"]
    (llm,) = application["args"]["llm_configs"]
    llm["model_loading_config"]["model_id"] = "model"  # the server tests' name
    return config


@pytest.fixture(scope="module")
def url(config):
    """The application, its cluster in this process."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in SETTINGS.items():
            monkeypatch.setenv(name, value)
        # Replicas are what a user's are: an engine in a process of its own.
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        # Two replicas of two CPUs, their ingress, and the application that fails.
        ray.init(num_cpus=10, log_to_driver=False, **INIT)
        try:
            deploy(config)
            yield f"http://127.0.0.1:{config['http_options']['port']}/v1"
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.mark.parametrize("num_events", [0, 2])
def test_a_dead_replica_gives_an_error_event_once_the_stream_runs(
    monkeypatch, num_events
):
    """Before the first event the exception stays one, for an HTTP status."""
    from ray.llm._internal.serve.core.ingress.utils import _openai_json_wrapper
    from ray.serve.llm.ingress import OpenAiIngress

    from vllm_sink.plugin.ray_serve import SinkIngress

    async def dying(self, **request):
        for index in range(num_events):
            yield f"data: {index}\n\n"
        raise ray.exceptions.ActorDiedError

    async def read() -> list[str]:
        ingress = SinkIngress.__new__(SinkIngress)
        events = []
        with pytest.raises(ray.exceptions.ActorDiedError):
            async for event in _openai_json_wrapper(ingress._get_response(body=None)):
                events.append(event)
        return events

    monkeypatch.setattr(OpenAiIngress, "_get_response", dying)
    events = asyncio.run(read())
    assert len(events) == (num_events + 1 if num_events else 0)
    if events:
        error = json.loads(events[-1].removeprefix("data: "))["error"]
        assert error["code"] == 503
        assert "send the request again" in error["message"]


@pytest.mark.parametrize(
    "prompt, text",
    [
        ("some text", "some text"),
        (["some ", "text"], "some text"),
        ([11, 2, 345], "11 2 345 "),
        ([[11, 2], [3]], "11 2 3 "),
        ([], " "),
        (None, " "),
    ],
)
def test_the_router_reads_a_text_in_every_prompt(prompt, text):
    """Ray's divides by its length, and asks for it again without end."""
    from vllm_sink.plugin.ray_serve import SinkRouter

    router = SinkRouter.__new__(SinkRouter)
    request = SimpleNamespace(args=[SimpleNamespace(prompt=prompt)])
    assert router._extract_text_from_request(request) == text


def chat(url: str) -> str:
    reply = post(
        url, "/chat/completions", messages=[QUESTION], max_tokens=24, temperature=0
    )
    return json.load(reply)["choices"][0]["message"]["content"]


def replicas() -> dict:
    """Handles of the model's replica actors, by their names."""
    return {
        actor["name"]: ray.get_actor(actor["name"], actor["namespace"])
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if "llm#LLMServer" in actor["name"]
    }


def busy_replicas() -> list[str]:
    """Names of the replicas that have a request, once for each."""
    return [
        name
        for name, actor in replicas().items()
        for _ in range(ray.get(actor.get_num_ongoing_requests.remote()))
    ]


def running_replicas() -> int:
    """How many Serve holds for ready."""
    deployment = serve.status().applications["llm"].deployments["LLMServer:model"]
    return deployment.replica_states.get("RUNNING", 0)


@contextlib.contextmanager
def long_stream(url: str, prompt: str):
    """A reply that doesn't end by itself, and the name of the replica that gives it."""
    with post(
        url,
        "/completions",
        prompt=prompt,
        max_tokens=6000,
        ignore_eos=True,
        stream=True,
    ) as stream:
        assert stream.readline().startswith(b"data: ")
        (name,) = busy_replicas()
        yield stream, name


def test_chat_on_two_replicas(url):
    assert "Paris" in chat(url)
    assert len(replicas()) == 2


def test_completions_with_logprobs(url):
    reply = post(
        url,
        "/completions",
        prompt="The capital of France is",
        max_tokens=4,
        temperature=0,
        logprobs=2,
    )
    choice = json.load(reply)["choices"][0]
    scores = choice["logprobs"]
    assert "Paris" in choice["text"]
    assert len(scores["tokens"]) == len(scores["token_logprobs"]) == 4
    assert all(score <= 0 for score in scores["token_logprobs"])
    assert all(len(top) >= 2 for top in scores["top_logprobs"])


def test_a_prompt_of_token_ids(url):
    texts = [
        json.load(post(url, "/completions", prompt=prompt, max_tokens=4, temperature=0))
        for prompt in ("The capital of France is", [504, 3575, 282, 4649, 314])
    ]
    by_text, by_ids = (reply["choices"][0]["text"] for reply in texts)
    assert "Paris" in by_text
    assert by_ids == by_text


def test_streaming(url):
    whole = chat(url)
    events = post(
        url,
        "/chat/completions",
        messages=[QUESTION],
        max_tokens=24,
        temperature=0,
        stream=True,
    )
    chunks = [line[6:].strip() for line in events if line.startswith(b"data: ")]
    assert chunks.pop() == b"[DONE]"
    choices = [json.loads(chunk)["choices"] for chunk in chunks]
    assert len(choices) > 3
    assert "".join(c[0]["delta"].get("content") or "" for c in choices if c) == whole


def test_turns_of_a_chat_land_where_their_prefix_is_cached(url):
    """Two chats, a replica each, whatever the order of their turns."""
    chats = ["Ann tells a story of the sea. ", "17 21 25 29 33 37 41 45 49 53 57 "]
    homes = []
    for index in (0, 1, 0, 0, 1, 0, 1, 1):
        with long_stream(url, chats[index]) as (_, name):
            if len(homes) < 2:
                homes.append(name)
            assert name == homes[index]
        while busy_replicas():
            time.sleep(0.1)
        chats[index] += "And then, another day, there was more of it. "
    assert len(set(homes)) == 2


@pytest.fixture(scope="module")
def killed(url):
    """The names of the replicas before one was killed, what its stream gave then.

    Its replacement starts while other tests run.
    """
    before = replicas()
    with long_stream(url, "Once upon a time") as (stream, name):
        ray.kill(before[name], no_restart=False)
        return set(before), stream.read()


def test_a_killed_replica_ends_its_stream_and_the_app_answers_again(url, killed):
    _, events = killed
    assert b"the replica that served this request died" in events.splitlines()[-2]
    assert b"[DONE]" not in events
    assert "Paris" in chat(url)


def test_a_wrong_policy_fails_the_deployment_with_its_message(url, config):
    wrong = copy.deepcopy(config)
    (application,) = wrong["applications"]
    application.update(name="wrong", route_prefix="/wrong")
    (llm,) = application["args"]["llm_configs"]
    llm["engine_kwargs"]["additional_config"]["sink"]["window_size"] = 0
    llm["deployment_config"] = {"num_replicas": 1, "max_constructor_retry_count": 1}
    message = "sink.window_size must be an integer >= 1, got 0"
    with pytest.raises(RuntimeError):
        deploy(wrong)
    status = serve.status().applications["wrong"]
    assert status.status == "DEPLOY_FAILED"
    messages = [status.message]
    messages += [deployment.message for deployment in status.deployments.values()]
    assert any(message in text for text in messages), messages
    # The other application doesn't notice.
    with contextlib.closing(post(url, "/completions", prompt="x", max_tokens=1)):
        pass


def test_a_killed_replica_is_replaced(url, killed):
    before, _ = killed
    deadline = time.monotonic() + 240
    while set(replicas()) <= before or running_replicas() < 2:
        assert time.monotonic() < deadline
        time.sleep(1)
    assert "Paris" in chat(url)
