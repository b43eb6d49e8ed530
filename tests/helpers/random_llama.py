"""Small models with random weights that attend: quick, and never downloaded."""

import json
from pathlib import Path

import torch
from transformers import (
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)


def save_llama(folder, **config) -> str:
    """The folder of a Llama whose logits depend on what attention sees.

    Its 4 query and 2 KV heads split over two workers.

    Args:
        config: Changes to its ``LlamaConfig``.
    """
    torch.manual_seed(0)
    defaults = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.15,
    }
    LlamaForCausalLM(LlamaConfig(**{**defaults, **config})).save_pretrained(folder)
    return str(folder)


def save_big_code(folder: Path, **facts) -> str:
    """The folder of a GPT-BigCode, which has one KV head.

    Args:
        facts: Added to its config.json.
    """
    small = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 256}
    config = GPTBigCodeConfig(**small, vocab_size=512, bos_token_id=1, eos_token_id=2)
    GPTBigCodeForCausalLM(config).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    return str(folder)
