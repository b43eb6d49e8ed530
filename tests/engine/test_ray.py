"""Tensor parallel over Ray workers, data parallel over Ray replicas."""

import asyncio
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from vllm import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

import vllm_sink
from tests.helpers.engine import SCORING, output_logprobs, prompt_logprobs, sink_engine

pytest.importorskip("ray", reason="needs the extra: pip install 'vllm-sink[ray]'")
import ray

from tests.helpers.random_llama import save_llama
from tests.helpers.ray_nodes import earlier_cluster
from vllm_sink.plugin.compat import register_backend_member
from vllm_sink.plugin.ray_executor import CpuRayExecutor, RayExecutorV2

SINKS, WINDOW = 4, 60
OPTIONS = {"skip_tokenizer_init": True, "max_model_len": 1024}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """Five windows of random tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 512, (5 * WINDOW,), generator=generator).tolist()


def test_another_version_is_refused_by_node_and_versions(monkeypatch, tmp_path):
    """Where vLLM's configuration holds it, the backend's member is the check."""
    package = Path(vllm_sink.__file__).parent
    shutil.copytree(package, tmp_path / "old" / "vllm_sink")
    source = tmp_path / "old" / "vllm_sink" / "__init__.py"
    own = f'__version__ = "{vllm_sink.__version__}"'
    assert own in source.read_text()
    source.write_text(source.read_text().replace(own, '__version__ = "0.0.9"'))
    member = register_backend_member()
    with (
        earlier_cluster(monkeypatch, tmp_path, tmp_path / "old"),
        pytest.raises(ray.exceptions.RayTaskError) as caught,
    ):
        ray.get(ray.remote(lambda backend: None).remote(member))
    error = str(caught.value)
    assert (
        f"vllm-sink on node {socket.gethostname()} must be {vllm_sink.__version__} "
        "like the driver's, got 0.0.9" in error
    )
    assert "ip=127.0.0.2" in error


def test_an_engine_refuses_a_node_without_the_plugin(llama, monkeypatch, tmp_path):
    absent = tmp_path / "none" / "vllm_sink"
    absent.mkdir(parents=True)
    (absent / "__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'vllm_sink'\")\n"
    )
    with (
        earlier_cluster(monkeypatch, tmp_path, tmp_path / "none"),
        pytest.raises(ray.exceptions.RayActorError) as caught,
        sink_engine(
            llama, SINKS, WINDOW, distributed_executor_backend="ray", **OPTIONS
        ),
    ):
        pass
    error = str(caught.value)
    assert (
        f"vllm-sink on node {socket.gethostname()} must be {vllm_sink.__version__} "
        "like the driver's, got none" in error
    )
    assert "ip=127.0.0.2" in error


@pytest.mark.parametrize(
    "is_failed, error", [(True, RuntimeError), (False, IndexError)]
)
def test_a_call_cut_by_the_shutdown_says_that_a_worker_died(
    monkeypatch, is_failed, error
):
    def cut(self, *args, **kwargs):
        raise IndexError

    monkeypatch.setattr(RayExecutorV2, "collective_rpc", cut)
    executor = CpuRayExecutor.__new__(CpuRayExecutor)
    executor.is_failed = is_failed
    with pytest.raises(error, match="a Ray worker died" if is_failed else ""):
        executor.collective_rpc("execute_model")


@pytest.fixture(scope="module")
def one_process(llama, prompt):
    """Log-probabilities without Ray: under the policy, and dense."""
    scores = []
    for policy in ((SINKS, WINDOW), ()):
        with sink_engine(llama, *policy, **OPTIONS) as llm:
            scores.extend(prompt_logprobs(llm, [prompt]))
    return scores


async def replica_logprobs(model: str, prompt: list[int]) -> list[torch.Tensor]:
    """The prompt's scores by each of two data-parallel replicas."""
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model,
            attention_backend="sink",
            additional_config={
                "sink": {"num_sink_tokens": SINKS, "window_size": WINDOW}
            },
            data_parallel_size=2,
            data_parallel_backend="ray",
            data_parallel_address="127.0.0.2",
            dtype="float32",
            enforce_eager=True,
            **OPTIONS,
        )
    )
    scores = []
    try:
        for rank in range(2):
            replies = engine.generate(
                {"prompt_token_ids": prompt},
                SCORING,
                request_id=str(rank),
                data_parallel_rank=rank,
            )
            *_, last = [reply async for reply in replies]
            scores.append(output_logprobs(last))
    finally:
        engine.shutdown()
    return scores


def test_data_parallel_replicas_equal_one_process(
    llama, one_process, prompt, monkeypatch, tmp_path
):
    """Each has the policy, and no bundle of its engine core's for a worker."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # A replica takes two CPUs: its worker's bundle and its engine core's.
    with earlier_cluster(monkeypatch, tmp_path, num_cpus=4):
        scores = asyncio.run(replica_logprobs(llama, prompt))
    expected, _ = one_process
    assert len(scores) == 2
    for found in scores:
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def tp2(llama, tmp_path_factory):
    """Two workers of a cluster that knows nothing of this process.

    The tests that need it come last: a process is in one cluster at a time.
    """
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


def test_the_workers_queues_have_no_name_to_leave_behind(tp2):
    """vLLM kills the workers, who alone would delete them."""
    queues = tp2.llm_engine.engine_core.engine_core.model_executor.response_mqs
    names = [queue.buffer.shared_memory.name for queue in queues]
    assert len(names) == 2
    assert not any(Path("/dev/shm", name).exists() for name in names)


def test_a_killed_worker_ends_requests_with_an_error(tp2, prompt):
    """The last of this engine: it doesn't come back by itself."""
    executor = tp2.llm_engine.engine_core.engine_core.model_executor
    start = time.monotonic()
    ray.kill(executor.ray_worker_handles[1].actor)
    with pytest.raises(RuntimeError, match=r"cancelled|Executor failed"):
        prompt_logprobs(tp2, [prompt])
    assert executor.is_failed
    assert time.monotonic() - start < 120
