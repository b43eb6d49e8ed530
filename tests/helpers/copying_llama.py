"""A Llama built by hand, with heads that are known to echo or to induce.

Residual stream: 64 dimensions of the token's random code, 64 that head (0, 0) fills
with the code of the token before, one constant. A head that compares code with code
echoes; one that compares code with the previous token's code induces. All other heads
look everywhere alike. Codes are compared in dimensions that rotary embedding hardly
turns.
"""

import math

import torch
from transformers import LlamaConfig, LlamaForCausalLM

CODE, HEAD, VOCAB, LAYERS = 64, 128, 512, 4
CONSTANT = 2 * CODE
THETA = 1e10
# (layer, query head); two query heads share a KV head.
ECHO_HEADS = ((1, 3), (3, 1))
INDUCTION_HEADS = ((2, 0), (3, 2))
SHARPNESS = 6.0


def build(attn_implementation: str) -> LlamaForCausalLM:
    """The model, in fp32."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=2 * CODE + 8,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        attn_implementation=attn_implementation,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.zero_()
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2, (VOCAB, CODE), generator=generator) * 2.0 - 1
    model.model.embed_tokens.weight[:, :CODE] = codes
    model.model.embed_tokens.weight[:, CONSTANT] = 8
    _previous_token(model)
    for layer, head in ECHO_HEADS:
        _compare(model, layer, head, keys_from=0)
    for layer, head in INDUCTION_HEADS:
        _compare(model, layer, head, keys_from=CODE)
    return model


def let_answer(model, layer: int, head: int, gain: float = 4.0) -> None:
    """Make an induction head of the last layer foretell the token that it finds."""
    attention = model.model.layers[layer].self_attn
    for i in range(CODE):
        attention.v_proj.weight[head // 2 * HEAD + i, i] = 1
        attention.o_proj.weight[i, head * HEAD + i] = gain
    model.lm_head.weight.copy_(model.model.embed_tokens.weight)


def _previous_token(model) -> None:
    """Layer 0, head 0: the token before, its code into the second 64 dimensions."""
    attention = model.model.layers[0].self_attn
    for pair in range(16):
        frequency = THETA ** (-pair / (HEAD / 2))
        # Query p turned back by one position: the best key is p - 1.
        attention.q_proj.weight[pair, CONSTANT] = 3 * math.cos(frequency)
        attention.q_proj.weight[pair + HEAD // 2, CONSTANT] = -3 * math.sin(frequency)
        attention.k_proj.weight[pair, CONSTANT] = 3
    for i in range(CODE):
        attention.v_proj.weight[i, i] = 1
        attention.o_proj.weight[CODE + i, i] = 1


def _compare(model, layer: int, head: int, keys_from: int) -> None:
    """Query: the token's code; key: the code in these dimensions."""
    attention = model.model.layers[layer].self_attn
    still = [*range(HEAD // 4, HEAD // 2), *range(3 * HEAD // 4, HEAD)]
    for i, dim in enumerate(still):
        attention.q_proj.weight[head * HEAD + dim, i] = SHARPNESS
        attention.k_proj.weight[head // 2 * HEAD + dim, keys_from + i] = 1
