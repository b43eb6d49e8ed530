"""``vllm serve --data-parallel-backend ray``: replicas as actors of a cluster."""

import json
import re
import shutil
import urllib.request
from pathlib import Path

import pytest
import torch

from tests.engine import prompt_logprobs, sink_engine
from tests.server import post, serve

pytest.importorskip("ray", reason="needs the extra: pip install 'vllm-sink[ray]'")
import ray

from tests.ray_nodes import earlier_cluster, save_llama

SINKS, WINDOW = 4, 60
POLICY = {"sink": {"num_sink_tokens": SINKS, "window_size": WINDOW}}


def test_two_replicas_score_like_one_process(model_path, monkeypatch, tmp_path):
    """Each replica has the policy, and no bundle of its engine core's as a worker."""
    llama = save_llama(tmp_path / "llama")
    for file in Path(model_path).glob("*token*"):
        shutil.copy(file, llama)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, 512, (5 * WINDOW,), generator=generator).tolist()
    with sink_engine(llama, SINKS, WINDOW, max_model_len=1024) as llm:
        (expected,) = prompt_logprobs(llm, [prompt])
    with sink_engine(llama, max_model_len=1024) as llm:
        (dense,) = prompt_logprobs(llm, [prompt])
    assert (expected - dense)[SINKS + WINDOW :].abs().max() > 0.1
    # A replica takes two CPUs: its worker's bundle and its engine core's.
    with earlier_cluster(monkeypatch, tmp_path, num_cpus=4):
        address = ray.get_runtime_context().gcs_address
        flags = ["--data-parallel-size", "2", "--data-parallel-backend", "ray"]
        flags += ["--data-parallel-address", "127.0.0.2", "--max-model-len", "1024"]
        flags += ["--additional-config", json.dumps(POLICY)]
        environment = {"RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}
        with serve(llama, tmp_path / "log", *flags, **environment) as url:
            for _ in range(4):
                with post(
                    url,
                    "/v1/completions",
                    prompt=prompt,
                    max_tokens=1,
                    prompt_logprobs=0,
                ) as reply:
                    (choice,) = json.load(reply)["choices"]
                pairs = zip(choice["prompt_logprobs"][1:], prompt[1:], strict=True)
                found = torch.tensor([x[str(token)]["logprob"] for x, token in pairs])
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
            with urllib.request.urlopen(url + "/metrics", timeout=60) as reply:
                metrics = reply.read().decode()
            served = re.findall(
                r'vllm:request_success_total\{engine="(\d)",'
                r'finished_reason="length".*\} (\d)',
                metrics,
            )
            assert dict(served) == {"0": "2", "1": "2"}, served
