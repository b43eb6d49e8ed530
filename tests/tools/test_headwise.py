"""A policy for every head of a Hugging Face model, against naive masks."""

import math
from itertools import pairwise

import pytest
import torch
import transformers

from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.tools.heads import attention, shared
from vllm_sink.tools.heads.attention import Headwise

TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "initializer_range": 0.3,
}
WINDOWS = {
    "sliding_window": 8,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
# What differs in attention: biases, norms of q and k, soft caps, sink logits, windows.
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {},
    "Phi3": {"pad_token_id": 0},
    "Olmo2": {},
    "Granite": {},
    "Gemma2": WINDOWS,
    "Gemma3": WINDOWS,
    "GptOss": {**WINDOWS, **EXPERTS},
}
NAMES = {"Gemma3": "Gemma3Text"}
# Gated attention between layers of linear attention.
OTHERS = {
    "Qwen3Next": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
    }
}


def build(family: str, implementation: str):
    """A tiny random model, equal for each implementation."""
    attention.register()
    config_class = getattr(transformers, f"{NAMES.get(family, family)}Config")
    config = config_class(**{**TINY, **{**FAMILIES, **OTHERS}[family]})
    config._attn_implementation = implementation
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=1.0)
    return model.requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_policy_it_is_the_models_own_attention(family, monkeypatch):
    monkeypatch.setattr("vllm_sink.tools.heads.call.TILE", 7)
    tokens = torch.randint(1, 96, (2, 30), generator=torch.Generator().manual_seed(1))
    want = build(family, "eager")(tokens).logits
    model = build(family, attention.NAME)
    torch.testing.assert_close(model(tokens).logits, want, atol=1e-4, rtol=1e-3)
    layers = attention.inspect(model, tokens[0].tolist())
    windowed = "layer_types" in FAMILIES[family]
    assert layers.full == ((0, 2) if windowed else (0, 1, 2, 3))
    assert (layers.num_layers, layers.num_kv_heads) == (4, 3)
    # With a cache, as the needles are asked.
    cache = transformers.DynamicCache(config=model.config)
    model(tokens[:, :20], past_key_values=cache)
    rest = model(tokens[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(rest, want[:, 20:], atol=1e-4, rtol=1e-3)


def naive(maps):
    """Attention with a [T, T] mask for each (layer, KV head)."""

    def function(module, query, key, value, mask, scaling=None, **_):
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        seen = maps[module.layer_idx].repeat_interleave(group, 0)
        scores = query @ key.transpose(2, 3) * scaling
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        return (weights @ value).transpose(1, 2), None

    return function


@pytest.mark.parametrize("tile", [7, 256])
def test_each_head_obeys_its_policy(monkeypatch, tile):
    monkeypatch.setattr("vllm_sink.tools.heads.call.TILE", tile)
    policy, length = RetentionPolicy(2, 5), 24
    torch.manual_seed(3)
    retrieval = torch.rand(4, 3) < 0.5
    retrieval[1], retrieval[2] = True, False
    see = torch.tensor(
        [[policy.sees(q, k) for k in range(length)] for q in range(length)]
    )
    causal = torch.ones(length, length).tril().bool()
    maps = torch.where(retrieval[..., None, None], causal, see)
    transformers.AttentionInterface.register("naive_heads", naive(maps))
    tokens = torch.randint(1, 96, (2, length))
    want = build("Llama", "naive_heads")(tokens).logits
    model = build("Llama", attention.NAME)
    with Headwise(policy=policy, retrieval=retrieval):
        torch.testing.assert_close(model(tokens).logits, want, atol=1e-4, rtol=1e-3)
        cache = transformers.DynamicCache(config=model.config)
        model(tokens[:, :15], past_key_values=cache)
        rest = model(tokens[:, 15:], past_key_values=cache).logits
        torch.testing.assert_close(rest, want[:, 15:], atol=1e-4, rtol=1e-3)
    # Gates of 0 and 1 are the same thing.
    with Headwise(policy=policy, gates=retrieval.float()):
        torch.testing.assert_close(model(tokens).logits, want, atol=1e-4, rtol=1e-3)
    # And no other map gives this.
    other = retrieval.clone()
    other[3, 0] = ~other[3, 0]
    with Headwise(policy=policy, retrieval=other):
        assert (model(tokens).logits - want).abs().max() > 1e-2


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_continuations_that_share_a_cache_equal_whole_sequences(family):
    """Three ends of one beginning, whose keys are held once."""
    model = build(family, attention.NAME)
    torch.manual_seed(4)
    start, ends = torch.randint(1, 96, (1, 20)), torch.randint(1, 96, (3, 6))
    policy, gates = RetentionPolicy(2, 5), torch.rand(4, 3)
    kept = gates < 0.5
    kept[0], kept[2] = True, False
    seen = []
    for how in (
        {},
        {"policy": policy},
        {"policy": policy, "retrieval": kept},
        {"policy": policy, "gates": gates},
    ):
        cache = transformers.DynamicCache(config=model.config)
        with Headwise(**how):
            model.base_model(start, past_key_values=cache)
            whole = torch.cat([start.expand(3, -1), ends], 1)
            want = model(whole, use_cache=False).logits[:, 20:]
        for _ in range(2):  # the cache can be continued again
            continued, past = shared.continued(cache, 3)
            with Headwise(**how, past=past):
                got = model(ends, past_key_values=continued).logits
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
        assert 0 in past or 1 in past, "full attention's keys are held once"
        seen.append(want)
    assert min((one - two).abs().max() for one, two in pairwise(seen)) > 1e-2


def test_real_model_under_the_policy(model_path, reference, prose):
    """All streaming: the reference's dense mask at absolute positions."""
    model, _ = attention.load(model_path)
    tokens = prose[:300]
    want = reference.logits(tokens, 4, 60, "absolute")
    with torch.inference_mode(), Headwise(policy=RetentionPolicy(4, 60)):
        got = model(torch.tensor([tokens]), use_cache=False).logits[0]
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)


def test_a_model_without_full_attention_is_refused(monkeypatch):
    every = {**WINDOWS, "layer_types": ["sliding_attention"] * 4}
    monkeypatch.setitem(FAMILIES, "Gemma2", every)
    with pytest.raises(ValueError, match="model must have full-attention layers"):
        attention.inspect(build("Gemma2", attention.NAME), [1, 2, 3])
