"""The engine's part of scripts/gpu_check.py, on the runner that it is for."""

import sys

import pytest

from scripts.engine_check import VOCABULARY, check_engine, main
from tests.helpers.random_llama import save_llama
from tests.runner_v2.serving import BLOCK, SINKS, SMALL, WINDOW, lose_sinks


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    return save_llama(folder, **(SMALL | {"vocab_size": VOCABULARY}))


def check(model, **settings):
    return check_engine(
        model,
        SINKS,
        WINDOW,
        [90, 33],
        4,
        block_size=BLOCK,
        enforce_eager=True,
        triton_interpreter=True,
        **settings,
    )


def test_the_command_passes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["engine_check", "--interpret"])
    assert main() == 0
    said = capsys.readouterr().out
    assert "runner='vllm.v1.worker.cpu.model_runner.CPUModelRunner'" in said
    assert said.endswith("engine: 66 tokens, 0 failed\n")


def test_it_passes_with_retrieval_heads(tmp_path):
    two_heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = save_llama(tmp_path, **(SMALL | two_heads | {"vocab_size": VOCABULARY}))
    assert check(model, heads=[[1, 0], [0, 0]]).problems == []


@pytest.mark.power
def test_it_sees_lost_sinks(model, monkeypatch):
    lose_sinks(monkeypatch)
    problems = check(model).problems
    assert any("log-probabilities of the prompt" in problem for problem in problems)
    assert any("log-probabilities of the reply" in problem for problem in problems)
