"""Heads of two policies over several processes: ranks with different heads.

Ray's workers are given the same values.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from tests.helpers.engine import (
    core,
    managers,
    output_logprobs,
    prompt_logprobs,
    sink_engine,
)
from tests.helpers.random_gemma import save_gemma
from tests.helpers.random_llama import save_llama
from tests.helpers.reference import load, logprobs
from tests.zoo.models import entry_of, save
from vllm_sink.settings import resolve
from vllm_sink.start.log_lines import find_slot_memory

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


OWN = [9] * 4  # of a layer with a window of its own: ignored
SPLIT = [[1, 0, 0, 0], [1, 1, 0, 1]]  # 3 retrieval heads are the first worker's, 1 not
TOLERANCE = 2e-3
POOL = 60


def save_falcon(folder) -> None:
    """Mamba beside attention in every layer."""
    entry = entry_of("Falcon-H1")
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    more = {**heads, "num_hidden_layers": 2, "max_position_embeddings": 1024}
    save(replace(entry, config={**entry.config, **more}), folder)


def save_own_windows(folder) -> None:
    """A window in every other layer."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    save_gemma(folder, head_dim=32, hidden_size=128, **heads)


def slot_memory(worker):
    """Of a worker's start line; runs in its process."""
    return find_slot_memory(worker.model_runner.vllm_config)


@pytest.mark.parametrize(
    "save_model, rows, num_cached",
    [
        (save_own_windows, [OWN, SPLIT[0], OWN, SPLIT[1]], 400),
        (save_falcon, SPLIT, 0),  # vLLM's Mamba 2 can't cache prefixes on a CPU
    ],
    ids=["Gemma 3", "Falcon-H1"],
)
def test_beside_layers_of_other_kinds(
    save_model, rows, num_cached, tmp_path, monkeypatch
):
    """Two workers whose heads differ, in chunks, past S + W, and after a hit."""
    save_model(tmp_path)
    model = load(tmp_path)
    generator = torch.Generator().manual_seed(1)
    first, second, turn = (
        torch.randint(3, 512, (length,), generator=generator).tolist()
        for length in (500, 300, 9)
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with sink_engine(
        str(tmp_path),
        SINKS,
        WINDOW,
        retrieval=dict(heads=rows),
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        block_size=32,
        num_gpu_blocks_override=POOL,
        max_model_len=600,
        max_num_batched_tokens=96,
        max_num_seqs=2,
        enable_prefix_caching=num_cached > 0,
        skip_tokenizer_init=True,
    ) as llm:
        memories = core(llm).model_executor.collective_rpc(slot_memory)
        assert [memory.counts for memory in memories] == [(3, 1), (1, 3)]
        assert memories[0].grouping == memories[1].grouping
        pool = managers(llm)[0].block_pool
        given = []
        take = pool.get_new_blocks
        pool.get_new_blocks = lambda count: given.append(count) or take(count)
        swapped = [row[2:] + row[:2] for row in rows]
        for prompt, got in zip(
            (first, second), prompt_logprobs(llm, [first, second]), strict=True
        ):
            want, other = (
                logprobs(model, prompt, SINKS, WINDOW, "cache", heads=heads)
                for heads in (rows, swapped)
            )
            assert (got - want).abs().max() < TOLERANCE
            assert (got - other).abs().max() > 20 * TOLERANCE, "no map to be seen"
        params = SamplingParams(
            temperature=0, max_tokens=60, ignore_eos=True, logprobs=0
        )
        history = first
        for cached in (0, num_cached):
            (output,) = llm.generate(
                {"prompt_token_ids": history}, params, use_tqdm=False
            )
            assert output.num_cached_tokens >= cached
            history = [*history, *output.outputs[0].token_ids]
            got = output_logprobs(output)
            want = logprobs(model, history, SINKS, WINDOW, "cache", heads=rows)
            assert (got - want[-len(got) :]).abs().max() < TOLERANCE
            history = [*history, *turn]
        assert sum(given) > POOL, "what was freed is used again"
