"""The record of an engine: one an engine, gone with it."""

import gc
import logging

import pytest
import torch
from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory

from tests.helpers.engine import core, prompt_logprobs
from tests.helpers.random_llama import save_llama
from vllm_sink.engine import Engine

PROMPT = list(range(3, 203))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


def build(model: str, **section) -> LLM:
    """An engine under these settings; stock attention without."""
    settings = {}
    if section:
        settings["attention_backend"] = "sink"
        settings["additional_config"] = {"sink": section}
    return LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        skip_tokenizer_init=True,
        **settings,
    )


def scores(llm: LLM) -> torch.Tensor:
    (found,) = prompt_logprobs(llm, [PROMPT])
    return found


def test_engines_side_by_side(model):
    """Built, asked in turn, deleted, built again: nobody has another's policy."""
    # pytest keeps log records, and theirs hold an engine's whole configuration.
    logging.disable()
    one = {"num_sink_tokens": 4, "window_size": 28}
    other = {"num_sink_tokens": 0, "window_size": 60}
    other["retrieval_heads"] = [[0, 1], [0, 0], [1, 0]]

    def collect():
        """Collect what vLLM froze, too: an engine's start freezes those before it."""
        gc.unfreeze()
        gc.collect()

    collect()
    before = set(Engine._records)
    try:
        a, b, stock = build(model, **one), build(model, **other), build(model)
        alone = [scores(llm) for llm in (a, b, stock)]
        for i in range(3):
            for j in range(i):
                assert (alone[i] - alone[j]).abs().max() > 1e-2, (i, j)
        again = [scores(llm) for llm in (stock, b, a)]
        for want, got in zip(alone, reversed(again), strict=True):
            assert torch.equal(want, got)
        records = [Engine.of(core(llm).vllm_config) for llm in (a, b)]
        assert [r.config.window_size for r in records] == [28, 60]
        assert records[0].head_groups is None and records[1].head_groups is not None
        del records, a
        collect()
        assert len(set(Engine._records) - before) == 1, "b's alone; stock has none"
        rebuilt = build(model, **one)
        assert torch.equal(scores(rebuilt), alone[0])
        assert torch.equal(scores(b), alone[1])
        del rebuilt, b, stock
        collect()
        assert not set(Engine._records) - before
    finally:
        logging.disable(logging.NOTSET)
        cleanup_dist_env_and_memory()
