"""Drafters for the tests, and counts of their accepted drafts."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.helpers.engine import core, run_steps
from tests.helpers.random_llama import save_llama

TARGET = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64}
OTHER_HEADS = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def save_guessable(folder: Path, **config) -> str:
    """The folder of a random Llama whose next token another one often guesses.

    The output's rows are the embeddings of the tokens before: about half of the
    time the token alone decides the next one, else what attention sees does.
    """
    path = Path(save_llama(folder, **(TARGET | config)))
    weights = load_file(path / "model.safetensors")
    make_guessable(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


def make_guessable(weights: dict[str, torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(weights["lm_head.weight"].shape, generator=generator)
    weights["model.embed_tokens.weight"] = rows * 0.5
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(4))
    weights["lm_head.weight"] = rows[order].contiguous()


def save_eagle(folder: Path, **config) -> str:
    """The folder of an EAGLE drafter for :func:`save_guessable`'s, random otherwise.

    It has no norm of its own input and output, and the target's output layer.
    """
    path = Path(save_guessable(folder, **(config | {"num_hidden_layers": 1})))
    dropped = {
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "lm_head.weight",
    }
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in load_file(path / "model.safetensors").items()
        if name not in dropped
    }
    hidden = weights["embed_tokens.weight"].shape[1]
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(hidden, hidden, generator=generator) * 0.02
    weights["fc.weight"] = torch.cat([torch.eye(hidden), mix], dim=1)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


def save_eagle3(folder: Path, **config) -> str:
    """The folder of a random EAGLE3 drafter, which reads three layers of its target."""
    path = Path(save_guessable(folder, **(config | {"num_hidden_layers": 1})))
    weights = {
        name.replace("model.layers.0.", "midlayer.").removeprefix("model."): tensor
        for name, tensor in load_file(path / "model.safetensors").items()
    }
    generator = torch.Generator().manual_seed(1)
    hidden = weights["norm.weight"].shape[0]
    for name in ("q", "k", "v"):  # of the token's embedding beside the target's
        own = f"midlayer.self_attn.{name}_proj.weight"
        weights[own] = torch.cat([weights[own], weights[own].flip(0)], dim=1)
    weights["midlayer.hidden_norm.weight"] = torch.ones(hidden)
    mix = torch.randn(hidden, 2 * hidden, generator=generator) * 0.02
    weights["fc.weight"] = torch.cat([mix, torch.eye(hidden)], dim=1)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


def save_mtp(folder: Path, mtp_layers: int = 1, **config) -> str:
    """The folder of a MiMo, a Qwen2 with MTP layers that often guess right."""
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"max_position_embeddings": 1024, "initializer_range": 0.15}
    model = Qwen2ForCausalLM(Qwen2Config(**(TARGET | shape | config)))
    model.save_pretrained(folder)
    facts = json.loads((folder / "config.json").read_text())
    facts["architectures"] = ["MiMoForCausalLM"]
    facts["num_nextn_predict_layers"] = mtp_layers
    (folder / "config.json").write_text(json.dumps(facts))
    weights = load_file(folder / "model.safetensors")
    make_guessable(weights)
    size = facts["hidden_size"]
    last = f"model.layers.{facts['num_hidden_layers'] - 1}."
    copied = [name for name in weights if name.startswith(last)]
    mix = torch.randn(size, size, generator=torch.Generator().manual_seed(1)) * 0.02
    for layer in range(mtp_layers):
        own = f"model.mtp_layers.{layer}."
        for name in copied:
            weights[own + name.removeprefix(last)] = weights[name].clone()
        for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
            weights[f"{own}{name}.weight"] = torch.ones(size)
        weights[f"{own}input_proj.weight"] = torch.cat([mix, torch.eye(size)], dim=1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def group_kinds(llm) -> list[str]:
    """The class of each KV cache group's spec."""
    groups = core(llm).scheduler.kv_cache_config.kv_cache_groups
    return [type(group.kv_cache_spec).__name__ for group in groups]


def generate(llm, prompts, params) -> tuple[dict[str, list[int]], int, int, int]:
    """Tokens by request, drafted and accepted tokens, most blocks while decoding."""
    scheduler = core(llm).scheduler
    counts = [0, 0]
    count_drafts = scheduler.make_spec_decoding_stats

    def spy(stats, *, num_draft_tokens, num_accepted_tokens, **kwargs):
        counts[0] += num_draft_tokens
        counts[1] += num_accepted_tokens
        return count_drafts(stats, num_draft_tokens, num_accepted_tokens, **kwargs)

    scheduler.make_spec_decoding_stats = spy
    most = 0

    def on_step():
        nonlocal most
        managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        for request in scheduler.requests.values():
            if request.num_computed_tokens < request.num_prompt_tokens + 8:
                continue
            for manager in managers:
                blocks = manager.req_to_blocks.get(request.request_id, [])
                most = max(most, sum(not block.is_null for block in blocks))

    tokens = run_steps(llm, prompts, params, on_step)
    return tokens, counts[0], counts[1], most
