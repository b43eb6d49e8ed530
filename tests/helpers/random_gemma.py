"""A small Gemma 3 with random weights: sliding windows beside full attention."""

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig


def save_gemma(folder, **config) -> Gemma3ForCausalLM:
    """The model, saved in ``folder``; every other layer has a window of its own.

    Args:
        config: Changes to its ``Gemma3TextConfig``.
    """
    torch.manual_seed(0)
    defaults = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "sliding_window": 40,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    settings = {**defaults, **config}
    layers = settings["num_hidden_layers"]
    kinds = ["sliding_attention", "full_attention"] * layers
    model = Gemma3ForCausalLM(Gemma3TextConfig(**settings, layer_types=kinds[:layers]))
    model.eval().save_pretrained(folder)
    return model
