"""A drafter model on runner V2: under the policy, exact, and of use."""

import pytest

from tests.helpers.drafters import save_eagle, save_guessable, save_mtp
from tests.helpers.engine import core, managers
from tests.helpers.random_llama import save_llama
from tests.runner_v2.graphs import replay_graphs
from tests.runner_v2.serving import SMALL, ask, assert_same, random_tokens, serving
from vllm_sink.engine import Engine

PROMPTS = [random_tokens(i, n) for i, n in enumerate((31, 75))]
NUM_DRAFTS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_llama(tmp_path_factory.mktemp("target"), **SMALL)


@pytest.fixture(scope="module")
def other_heads(tmp_path_factory) -> str:
    changes = {"num_hidden_layers": 1, "num_key_value_heads": 2}
    return save_llama(tmp_path_factory.mktemp("drafter"), **(SMALL | changes))


@pytest.fixture(scope="module")
def want(model):
    """Without speculation, on runner V1."""
    with serving(model, "v1") as llm:
        return ask(llm, PROMPTS, 12)


def drafting(model: str, drafter: str):
    speculation = {
        "method": "draft_model",
        "model": drafter,
        "num_speculative_tokens": NUM_DRAFTS,
    }
    return serving(model, "v2", speculative_config=speculation)


def count_steps(llm, monkeypatch) -> list[int]:
    """Tokens scheduled in each step from now on."""
    scheduler, sizes = core(llm).scheduler, []
    schedule = scheduler.schedule

    def count(*args, **kwargs):
        output = schedule(*args, **kwargs)
        sizes.append(output.total_num_scheduled_tokens)
        return output

    monkeypatch.setattr(scheduler, "schedule", count)
    return sizes


def test_the_model_drafting_for_itself(model, want, monkeypatch):
    with drafting(model, model) as llm:
        groups = core(llm).scheduler.kv_cache_config.kv_cache_groups
        assert [len(group.layer_names) for group in groups] == [4]
        steps = count_steps(llm, monkeypatch)
        assert_same(ask(llm, PROMPTS, 12), want)
        # All drafts are right: 11 tokens after the first come 4 a step.
        assert len(steps) <= 8, steps
        assert llm.reset_prefix_cache()
        used = replay_graphs(llm, "FULL", monkeypatch)
        assert_same(ask(llm, PROMPTS[:1], 12), want[:1])
        assert set(used) == {"mixed"}


def test_a_drafter_with_other_heads(model, other_heads, want):
    with drafting(model, other_heads) as llm:
        assert_same(ask(llm, PROMPTS[:1], 12), want[:1])


def test_eagle(tmp_path, monkeypatch):
    """One block table for all; some drafts are taken.

    vLLM's n-gram drafter for runner V2 does not run in Triton's interpreter (``mask
    has unsupported dtype`` in its kernel); it has no KV cache.
    """
    model = save_guessable(tmp_path / "target", **SMALL)
    with serving(model, "v1") as llm:
        steps_alone = count_steps(llm, monkeypatch)
        want = ask(llm, PROMPTS, 12)
    speculation = {
        "method": "eagle",
        "model": save_eagle(tmp_path / "drafter", **SMALL),
        "num_speculative_tokens": NUM_DRAFTS,
    }
    with serving(model, "v2", speculative_config=speculation) as llm:
        groups = core(llm).scheduler.kv_cache_config.kv_cache_groups
        assert [len(group.layer_names) for group in groups] == [3]
        steps = count_steps(llm, monkeypatch)
        assert_same(ask(llm, PROMPTS, 12), want)
    assert len(steps) < len(steps_alone)


TWO_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
POLICY = {"retrieval_heads": [[1, 0], [0, 0]]}


@pytest.fixture(scope="module")
def with_mtp(tmp_path_factory) -> str:
    return save_mtp(tmp_path_factory.mktemp("mtp"), **(SMALL | TWO_HEADS))


@pytest.fixture(scope="module")
def want_of_heads(with_mtp):
    """(replies, number of steps) without speculation, on runner V1."""
    with (
        serving(with_mtp, "v1", policy=POLICY) as llm,
        pytest.MonkeyPatch.context() as m,
    ):
        steps = count_steps(llm, m)
        return ask(llm, PROMPTS[:1], 16), len(steps)


@pytest.mark.parametrize("method", ["eagle", "mtp"])
def test_beside_retrieval_heads(method, with_mtp, want_of_heads, tmp_path, monkeypatch):
    """A drafter's heads stream (EAGLE) or keep everything (MTP), in one group."""
    want, num_steps_alone = want_of_heads
    speculation = {"method": method, "num_speculative_tokens": NUM_DRAFTS}
    speculation["model"] = with_mtp
    if method == "eagle":
        speculation["model"] = save_eagle(tmp_path, **(SMALL | TWO_HEADS))
    with serving(with_mtp, "v2", policy=POLICY, speculative_config=speculation) as llm:
        groups = core(llm).scheduler.kv_cache_config.kv_cache_groups
        own = [any(".2." in name for name in group.layer_names) for group in groups]
        assert sum(own) == 1
        kind = type(managers(llm)[own.index(True)]).__name__
        assert kind == ("SinkManager" if method == "eagle" else "RetrievalManager")
        steps = count_steps(llm, monkeypatch)
        assert_same(ask(llm, PROMPTS[:1], 16), want)
        assert len(steps) < num_steps_alone


def test_beside_layers_of_other_kinds(tmp_path, monkeypatch):
    """An EAGLE drafter's heads are in slots, beside a layer with its own window."""
    shape = SMALL | TWO_HEADS
    kinds = {"layer_types": ["sliding_attention", "full_attention"]}
    model = save_guessable(tmp_path / "target", **shape, **kinds, sliding_window=24)
    policy = {"retrieval_heads": [[0, 0], [1, 0]]}
    with serving(model, "v1", policy=policy) as llm:
        steps_alone = count_steps(llm, monkeypatch)
        want = ask(llm, PROMPTS[:1], 16)
    speculation = {
        "method": "eagle",
        "model": save_eagle(tmp_path / "drafter", **shape),
        "num_speculative_tokens": NUM_DRAFTS,
    }
    with serving(model, "v2", policy=policy, speculative_config=speculation) as llm:
        (layer,) = Engine.of(llm.llm_engine.vllm_config).head_groups.drafters
        names = {head.slot.layer_name for head in layer.impl.heads}
        groups = core(llm).scheduler.kv_cache_config.kv_cache_groups
        own = [names <= set(group.layer_names) for group in groups]
        assert sum(own) == 1
        assert type(managers(llm)[own.index(True)]).__name__ == "SinkManager"
        steps = count_steps(llm, monkeypatch)
        assert_same(ask(llm, PROMPTS[:1], 16), want)
        assert len(steps) < len(steps_alone)
