"""Drafters obey the policy: same tokens as without them, within the same memory."""

import json

import pytest
import torch
from vllm import SamplingParams

from tests.helpers.drafters import (
    OTHER_HEADS,
    TARGET,
    generate,
    group_kinds,
    save_eagle,
    save_guessable,
    save_mtp,
)
from tests.helpers.engine import core, managers, model_runner, sink_engine
from vllm_sink.engine import Engine
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.tools import sizing
from vllm_sink.tools.drafter import read_drafter
from vllm_sink.tools.model_layers import read_config, read_shape

SINKS, WINDOW, BLOCK, DRAFTS = 4, 44, 16, 3
POLICY = RetentionPolicy(SINKS, WINDOW)
# While decoding: the last token, its drafts, and as many looked ahead.
MOST_BLOCKS = POLICY.max_blocks(1 + 2 * DRAFTS + 1, 10**6, BLOCK)
PARAMS = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, detokenize=False)


def engine(model, speculative, **changes):
    settings = {
        "block_size": BLOCK,
        "max_model_len": 512,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 64,  # prompts come in chunks
        "skip_tokenizer_init": True,
        "speculative_config": speculative
        and {"num_speculative_tokens": DRAFTS, **speculative},
    }
    return sink_engine(model, SINKS, WINDOW, **(settings | changes))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    make = tmp_path_factory.mktemp
    return {
        "target": save_guessable(make("target")),
        "other heads": save_guessable(make("draft"), **OTHER_HEADS),
        "eagle": save_eagle(make("eagle")),
    }


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randint(1, TARGET["vocab_size"], (length,), generator=generator).tolist()
        for length in (31, 150)
    ]


@pytest.fixture(scope="module")
def plain(folders, prompts):
    with engine(folders["target"], None) as llm:
        return generate(llm, prompts, PARAMS)[0]


@pytest.mark.parametrize(
    "method, folder",
    [
        ("draft_model", "target"),
        ("draft_model", "other heads"),
        ("eagle", "eagle"),
        ("ngram", None),
    ],
)
def test_tokens_and_memory(method, folder, folders, prompts, plain):
    speculative = {"method": method}
    if folder is None:
        speculative |= {"prompt_lookup_max": 2, "prompt_lookup_min": 1}
    else:
        speculative["model"] = folders[folder]
    with engine(folders["target"], speculative) as llm:
        assert group_kinds(llm) == ["SinkSpec"]  # one block table for all
        tokens, drafted, accepted, most = generate(llm, prompts, PARAMS)
        if folder is not None:
            own = model_runner(llm).drafter.draft_attn_groups
            assert [group.backend.get_name() for group in own] == ["SINK"]
    assert tokens == plain
    assert 0 < accepted <= drafted
    if folder == "target":
        assert accepted == drafted > 60
    assert 0 < most <= MOST_BLOCKS


# 2 KV heads a layer: of streaming heads there are several groups, then of others.
FEW, MANY = [[1, 0], [0, 0], [0, 0]], [*[[1, 1]] * 5, [0, 0]]


@pytest.fixture(scope="module")
def with_mtp(tmp_path_factory) -> str:
    """Of several MTP layers, all of which have a cache."""
    folder, num_layers = tmp_path_factory.mktemp("mtp"), len(MANY)
    return save_mtp(folder, mtp_layers=DRAFTS, num_hidden_layers=num_layers)


@pytest.mark.parametrize(
    "method, heads, kind",
    [("eagle", FEW, "SinkManager"), ("mtp", MANY, "RetrievalManager")],
)
def test_beside_retrieval_heads(method, heads, kind, folders, with_mtp, prompts):
    """A drafter's heads are of one kind and in one group of several."""
    target = with_mtp if method == "mtp" else folders["target"]
    speculative = {"method": method, "model": folders.get(method, with_mtp)}
    settings = {"retrieval": {"heads": heads}}
    with engine(target, None, **settings) as llm:
        want = generate(llm, prompts, PARAMS)[0]
    with engine(target, speculative, **settings) as llm:
        managers_by_group = managers(llm)
        (own,) = model_runner(llm).drafter.draft_attn_groups
        manager = managers_by_group[own.kv_cache_group_id]
        check_size(llm, target, speculative)
        assert type(manager).__name__ == kind
        assert sum(type(other) is type(manager) for other in managers_by_group) > 1
        tokens, drafted, accepted, _ = generate(llm, prompts, PARAMS)
    assert tokens == want
    assert 0 < accepted <= drafted


def check_size(llm, target, speculative) -> None:
    """The calculator's groups and bytes are the pool's."""
    cache = core(llm).scheduler.kv_cache_config
    settings = Engine.of(llm.llm_engine.vllm_config).config
    config, given = read_config(target), {"num_speculative_tokens": DRAFTS}
    given = json.dumps(given | speculative)
    shape = read_shape(config, "float32")
    draft = read_drafter(given, config, shape, "float32", 1).heads(shape, 1)
    memory = sizing.heads_memory(shape, settings, 1, BLOCK, draft)
    assert memory.grouping.num_groups == len(cache.kv_cache_groups)
    (pool,) = {tensor.size for tensor in cache.kv_cache_tensors}
    assert pool == cache.num_blocks * memory.pool_block_bytes


def test_on_cuda_the_drafter_is_placed_as_well(folders, prompts, plain, as_on_cuda):
    speculative = {"method": "draft_model", "model": folders["other heads"]}
    with engine(folders["target"], speculative) as llm:
        backend = core(llm).vllm_config.speculative_config.attention_backend
        assert backend.name == "SINK"
        assert generate(llm, prompts, PARAMS)[0] == plain


def test_a_drafter_elsewhere_is_refused(folders):
    speculative = {
        "method": "draft_model",
        "model": folders["target"],
        "attention_backend": "CPU_ATTN",
    }
    message = (
        "speculative_config.attention_backend must be SINK or unset .* got CPU_ATTN; "
        "take it out"
    )
    with (
        pytest.raises(ValueError, match=message),
        engine(folders["target"], speculative),
    ):
        pass


def test_draft_model_for_a_hybrid_is_refused_on_v1(folders, tmp_path):
    """Its layers would be given the block table of a group that isn't theirs."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **TARGET,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
    )
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    speculative = {"method": "draft_model", "model": folders["target"]}
    message = (
        "method must not be 'draft_model' on model runner V1 .* got "
        "OwnWindowSpec, SinkSpec; choose ngram or eagle"
    )
    with (
        pytest.raises(ValueError, match=message),
        engine(str(tmp_path), speculative),
    ):
        pass
