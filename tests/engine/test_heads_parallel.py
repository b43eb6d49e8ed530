"""Heads of two policies over several processes: ranks with different heads.

Ray's workers are given the same values.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.engine import prompt_logprobs, sink_engine
from tests.helpers.random_llama import save_llama
from vllm_sink.settings import resolve

SINKS, WINDOW = 4, 60
OPTIONS = {"skip_tokenizer_init": True, "max_model_len": 1024}
# 3 layers x 6 KV heads; of the retrieval heads three workers hold 5, 2 and 3.
HEADS = [[1, 1, 1, 0, 0, 1], [1, 0, 1, 0, 1, 0], [1, 1, 0, 0, 0, 1]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    shape = {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 192}
    folder = tmp_path_factory.mktemp("llama")
    # 576: three workers share the vocabulary.
    return save_llama(folder, intermediate_size=384, vocab_size=576, **shape)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(0, 512, (length,), generator=generator).tolist()
        for length in (5 * WINDOW, 3 * WINDOW, 10)
    ]


def score(llama, prompts, heads=HEADS, **options) -> list[torch.Tensor]:
    with sink_engine(
        llama, SINKS, WINDOW, retrieval=dict(heads=heads), **OPTIONS, **options
    ) as llm:
        specs = llm.collective_rpc("get_kv_cache_spec")
        # Equal numbers of each kind on every rank, padding included.
        kinds = [
            sorted(type(spec).__name__ for spec in worker.values()) for worker in specs
        ]
        assert all(kind == kinds[0] for kind in kinds)
        return prompt_logprobs(llm, prompts)


@pytest.fixture(scope="module")
def one_process(llama, prompts) -> list[torch.Tensor]:
    return score(llama, prompts)


def check_same(found, expected) -> None:
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_tensor_parallel_equals_one_process(
    llama, prompts, one_process, monkeypatch, tmp_path
):
    """From a pattern file that is gone once it was read: values reach the workers."""
    pattern = tmp_path / "heads.tsv"
    np.savetxt(pattern, np.array(HEADS, dtype=float), delimiter="\t")
    read = resolve.read_scores

    def read_once(source, shape):
        scores = read(source, shape)
        Path(source).unlink()
        return scores

    monkeypatch.setattr(resolve, "read_scores", read_once)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    found = score(
        llama,
        prompts,
        str(pattern),
        tensor_parallel_size=3,
        distributed_executor_backend="mp",
    )
    assert not pattern.exists()
    check_same(found, one_process)
