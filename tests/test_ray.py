"""``--distributed-executor-backend ray``: tensor parallel over Ray workers."""

import shutil
import socket
import time
from pathlib import Path

import pytest
import torch

import vllm_sink
from tests.engine import prompt_logprobs, sink_engine

pytest.importorskip("ray", reason="needs the extra: pip install 'vllm-sink[ray]'")
import ray

from tests.ray_nodes import earlier_cluster, save_llama

SINKS, WINDOW = 4, 60
OPTIONS = {"skip_tokenizer_init": True, "max_model_len": 1024}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    """A random Llama whose 4 query and 2 KV heads split over two workers."""
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """Five windows of random tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 512, (5 * WINDOW,), generator=generator).tolist()


def start_on(llama, monkeypatch, directory, *import_first) -> str:
    """The error of an engine on a node with another vllm_sink."""
    with (
        earlier_cluster(monkeypatch, directory, *import_first),
        pytest.raises(ray.exceptions.RayActorError) as caught,
        sink_engine(
            llama, SINKS, WINDOW, distributed_executor_backend="ray", **OPTIONS
        ),
    ):
        pass
    return str(caught.value)


def test_another_version_is_refused_by_node_and_versions(llama, monkeypatch, tmp_path):
    package = Path(vllm_sink.__file__).parent
    shutil.copytree(package, tmp_path / "old" / "vllm_sink")
    source = tmp_path / "old" / "vllm_sink" / "__init__.py"
    own = f'__version__ = "{vllm_sink.__version__}"'
    assert own in source.read_text()
    source.write_text(source.read_text().replace(own, '__version__ = "0.0.9"'))
    error = start_on(llama, monkeypatch, tmp_path, tmp_path / "old")
    assert (
        f"vllm-sink on node {socket.gethostname()} must be {vllm_sink.__version__} "
        "like the driver's, got 0.0.9" in error
    )
    assert "ip=127.0.0.2" in error


def test_a_missing_plugin_is_refused_by_node_and_name(llama, monkeypatch, tmp_path):
    absent = tmp_path / "none" / "vllm_sink"
    absent.mkdir(parents=True)
    (absent / "__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'vllm_sink'\")\n"
    )
    error = start_on(llama, monkeypatch, tmp_path, tmp_path / "none")
    assert "No module named 'vllm_sink'" in error
    assert "ip=127.0.0.2" in error


@pytest.fixture(scope="module")
def tp2(llama, tmp_path_factory):
    """Two workers of a cluster that knows nothing of this process."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        directory = tmp_path_factory.mktemp("driver")
        with (
            earlier_cluster(monkeypatch, directory),
            sink_engine(
                llama,
                SINKS,
                WINDOW,
                distributed_executor_backend="ray",
                tensor_parallel_size=2,
                **OPTIONS,
            ) as llm,
        ):
            yield llm


@pytest.fixture(scope="module")
def one_process(llama, prompt):
    """Log-probabilities without Ray: under the policy, and dense."""
    scores = []
    for policy in ((SINKS, WINDOW), ()):
        with sink_engine(llama, *policy, **OPTIONS) as llm:
            scores.extend(prompt_logprobs(llm, [prompt]))
    return scores


def test_tensor_parallel_equals_one_process(one_process, tp2, prompt):
    expected, dense = one_process
    (found,) = prompt_logprobs(tp2, [prompt])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    # Past the window the policy shows; within it nothing is evicted.
    assert (expected - dense)[SINKS + WINDOW :].abs().max() > 0.1
    torch.testing.assert_close(
        expected[: WINDOW - 1], dense[: WINDOW - 1], atol=1e-4, rtol=0
    )


def test_the_workers_have_the_drivers_policy_and_real_cpus(tp2):
    for specs in tp2.collective_rpc("get_kv_cache_spec"):
        assert len(specs) == 3
        for spec in specs.values():
            assert spec.num_kv_heads == 1
            assert (spec.num_sink_tokens, spec.sliding_window) == (SINKS, WINDOW)
    assert ray.available_resources().get("CPU", 0) == 0
    assert "GPU" not in ray.cluster_resources()


def test_a_killed_worker_ends_requests_with_an_error(tp2, prompt):
    """The last of this engine: it doesn't come back by itself."""
    executor = tp2.llm_engine.engine_core.engine_core.model_executor
    start = time.monotonic()
    ray.kill(executor.ray_worker_handles[1].actor)
    with pytest.raises(RuntimeError, match=r"cancelled|Executor failed"):
        prompt_logprobs(tp2, [prompt])
    assert executor.is_failed
    assert time.monotonic() - start < 120
