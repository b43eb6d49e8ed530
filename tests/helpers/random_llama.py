"""A small Llama with random weights that attend: quick, and never downloaded."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


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
