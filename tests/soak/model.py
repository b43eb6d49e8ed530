"""The soak's model: random and small, with a real tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from tests.helpers.random_llama import save_llama


def save_tiny(tokenizer_of: str, folder: Path, max_model_len: int) -> str:
    """A random Llama that speaks the tokens of another model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    save_llama(
        folder,
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        max_position_embeddings=max_model_len,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    tokenizer.save_pretrained(folder)
    return str(folder)
