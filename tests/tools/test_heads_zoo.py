"""The finder reads every architecture of the zoo as eager attention does."""

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from tests.zoo.models import BASE, VOCABULARY, ZOO
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.tools.heads import attention, scores

LENGTH = 100  # the zoo's windows are 40, its chunks 64
REFUSED = {
    "Mistral, windowed": "model must have full-attention layers",
    "Zamba2": "model must have an attention module for each layer, got one",
}


def build(entry, implementation: str):
    """The entry's model with random weights, equal for each implementation."""
    attention.register()
    config = CONFIG_MAPPING[entry.kind](**{**BASE, **entry.config})
    torch.manual_seed(0)
    model = getattr(transformers, entry.auto).from_config(
        config, attn_implementation=implementation, dtype=torch.float32
    )
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_every_architecture(entry, monkeypatch):
    monkeypatch.setattr("vllm_sink.tools.heads.call.TILE", 32)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (1, LENGTH), generator=generator)
    want = build(entry, "eager")(tokens, use_cache=False).logits
    model = build(entry, attention.NAME)
    got = model(tokens, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
    passage = tokens[0, :40].tolist()
    if entry.name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[entry.name]):
            attention.inspect(model, passage)
        return
    layers = attention.inspect(model, passage)
    assert 0 < layers.num_heads <= 4 * 4
    echo, induction = scores.echo_and_induction(model, passage, layers, [])
    for values in (echo, induction):
        assert values.isfinite().all()
        rows = values.sum(1) > 0
        assert rows.nonzero().flatten().tolist() == list(layers.full)
    with attention.Headwise(policy=RetentionPolicy(4, 20)):
        streaming = model(tokens, use_cache=False).logits
    # A token that every layer sees whole is as it was; the last one is not.
    torch.testing.assert_close(streaming[:, :20], want[:, :20], atol=1e-4, rtol=1e-3)
    assert (streaming[:, -1] - want[:, -1]).abs().max() > 1e-4
