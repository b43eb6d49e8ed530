"""Drafters whose heads share the pool with retrieval heads and other layers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import SamplingParams

from tests.helpers.drafters import generate, save_eagle, save_eagle3
from tests.helpers.engine import (
    core,
    managers,
    model_runner,
    output_logprobs,
    sink_engine,
)
from tests.helpers.reference import load, logprobs
from tests.zoo.models import entry_of, save
from vllm_sink.engine import Engine
from vllm_sink.policy import draft_heads
from vllm_sink.tools import drafter, sizing
from vllm_sink.tools.model_layers import read_config, read_shape

TOLERANCE = 2e-3
S, W, BLOCK, DRAFTS = 4, 60, 16, 3
SHAPE = {"vocab_size": 32, "hidden_size": 128, "head_dim": 32}
PARAMS = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=0)
SETTINGS = {
    "block_size": BLOCK,
    "max_model_len": 512,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 64,  # prompts come in chunks
    "skip_tokenizer_init": True,
}
OWN = [0, 0]  # of a layer that the policy doesn't govern


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randint(3, SHAPE["vocab_size"], (length,), generator=generator).tolist()
        for length in (31, 150)
    ]


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """(folder, reference model): every other layer has a window of 40; sink logits."""
    entry = entry_of("gpt-oss")
    entry = replace(entry, config=entry.config | {"vocab_size": SHAPE["vocab_size"]})
    path = save(entry, tmp_path_factory.mktemp("gpt-oss"))
    return path, load(path)


@pytest.fixture(scope="module")
def drafters(tmp_path_factory) -> dict[str, str]:
    eagle = Path(save_eagle(tmp_path_factory.mktemp("eagle"), **SHAPE))
    weights = load_file(eagle / "model.safetensors")
    del weights["embed_tokens.weight"]  # the target's are right more often
    save_file(weights, eagle / "model.safetensors", metadata={"format": "pt"})
    layers = {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
    eagle3 = save_eagle3(tmp_path_factory.mktemp("eagle3"), **SHAPE, **layers)
    return {"eagle": str(eagle), "eagle3": eagle3}


@pytest.mark.parametrize(
    "method, keeps_everything, heads",
    [
        ("eagle3", False, [OWN, [1, 0], OWN, [0, 0]]),
        # As an MTP drafter: none has windows in its model and runs on a CPU.
        ("eagle", True, [OWN, [1, 1], OWN, [0, 0]]),
    ],
    ids=["split", "whole layers"],
)
def test_drafts_change_nothing(
    method, keeps_everything, heads, gpt_oss, drafters, prompts, monkeypatch
):
    """Answers are the reference's; the drafter is in its own group's slots."""
    monkeypatch.setitem(draft_heads.KEEPS_EVERYTHING, method, keeps_everything)
    path, reference = gpt_oss
    speculative = {"method": method, "model": drafters[method]}
    speculative["num_speculative_tokens"] = DRAFTS
    retrieval = {"heads": heads}
    with sink_engine(
        path, S, W, retrieval=retrieval, speculative_config=speculative, **SETTINGS
    ) as llm:
        (own,) = model_runner(llm).drafter.draft_attn_groups
        manager = type(managers(llm)[own.kv_cache_group_id]).__name__
        assert manager == ("RetrievalManager" if keeps_everything else "SinkManager")
        config = llm.llm_engine.vllm_config
        groups, settings = Engine.of(config).head_groups, Engine.of(config).config
        cache = core(llm).scheduler.kv_cache_config
        (layer,) = groups.drafters
        names = cache.kv_cache_groups[own.kv_cache_group_id].layer_names
        assert {head.slot.layer_name for head in layer.impl.heads} <= set(names)
        memory = groups.plan(config)
        assert len(cache.kv_cache_groups) == memory.grouping.num_groups
        pool = max(tensor.offset + tensor.size for tensor in cache.kv_cache_tensors)
        assert pool == cache.num_blocks * memory.pool_block_bytes
        config, given = read_config(path), json.dumps(speculative)
        shape = read_shape(config, "float32")
        own = drafter.read_drafter(given, config, shape, "float32", 1).heads(shape, 1)
        assert sizing.slot_memory(shape, settings, 1, BLOCK, own) == memory
        tokens, drafted, accepted, _ = generate(llm, prompts, PARAMS)
        assert 0 < accepted <= drafted
        assert llm.reset_prefix_cache()
        free = managers(llm)[0].block_pool.get_num_free_blocks()
        assert free == cache.num_blocks - 1  # all but the null block
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(asked, PARAMS, use_tqdm=False)
    for index, output in enumerate(outputs):
        reply = list(output.outputs[0].token_ids)
        assert reply == tokens[str(index)] and len(set(reply)) > 10
        want = logprobs(reference, prompts[index] + reply, S, W, heads=heads)
        want = want[-len(reply) :]
        assert (output_logprobs(output) - want).abs().max() < TOLERANCE
