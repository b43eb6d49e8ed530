"""Heads that keep everything beside heads under the policy, on runner V2."""

import pytest

from tests.helpers.engine import managers
from tests.helpers.random_llama import save_llama
from tests.runner_v2.graphs import replay_graphs
from tests.runner_v2.serving import (
    BLOCK,
    PROMPTS,
    SMALL,
    assert_same,
    first_turn,
    second_turn,
    serving,
)
from vllm_sink.cache.block_manager import SinkManager


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"), **SMALL)


def test_a_layer_that_keeps_everything(model, monkeypatch):
    policy = {"retrieval_layers": [1]}
    with serving(model, "v1", policy=policy) as llm:
        first = first_turn(llm)
        second = second_turn(llm, first)
    with serving(model, "v1") as llm:
        without = first_turn(llm)
    assert (first[2].logprobs - without[2].logprobs).abs().max() > 1e-2
    with serving(model, "v2", policy=policy) as llm:
        kinds = [isinstance(manager, SinkManager) for manager in managers(llm)]
        assert sorted(kinds) == [False, True]
        assert_same(first_turn(llm), first)
        answers = second_turn(llm, first)
        assert_same(answers, second)
        assert all(
            answer.cached >= (len(prompt) - 1) // BLOCK * BLOCK
            for answer, prompt in zip(answers, PROMPTS[1:], strict=True)
        )
        used = replay_graphs(llm, "FULL", monkeypatch)
        assert_same(first_turn(llm), first)
        assert set(used) == {"mixed"}


def test_heads_of_two_kinds_in_one_layer(tmp_path, monkeypatch):
    """Each KV head's cache, block table and slots by address, graphs included.

    Retrieval heads that keep everything: the layer above, and tests/gpu_path.
    """
    path = save_llama(
        tmp_path, **SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2}
    )
    policy = {"retrieval_heads": [[1, 0], [0, 1]], "retrieval_window_size": 50}
    with serving(path, "v1", policy=policy) as llm:
        first = first_turn(llm)
        second = second_turn(llm, first)
    with serving(path, "v2", policy=policy) as llm:
        assert len(managers(llm)) == 2
        assert_same(first_turn(llm), first)
        answers = second_turn(llm, first)
        assert_same(answers, second)
        assert all(answer.cached > 0 for answer in answers)
        used = replay_graphs(llm, "FULL", monkeypatch)
        assert_same(first_turn(llm), first)
        assert set(used) == {"mixed"}
