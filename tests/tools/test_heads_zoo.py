"""The finder reads every architecture of the zoo as eager attention does."""

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from tests.zoo.models import BASE, VOCABULARY, ZOO
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.tools.heads import answers, attention, fraction, needles, scores

LENGTH = 100  # the zoo's windows are 40, its chunks 64
REFUSED = {
    "Mistral, windowed": "model must have full-attention layers",
    "Zamba2": "model must have an attention module for each layer, got one",
}


# Kinds of layers beside full attention, and what attention does besides.
BESIDE = ("Gemma 2", "Gemma 4", "gpt-oss", "Qwen3-Next", "Falcon-H1", "Nemotron-H")


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


@pytest.mark.parametrize(
    "entry", [entry for entry in ZOO if entry.name in BESIDE], ids=lambda e: e.name
)
def test_gates_train_beside_other_layers(entry):
    """What is counted and written is the governed layers' alone."""
    model = build(entry, attention.NAME)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (60,), generator=generator).tolist()
    layers = attention.inspect(model, tokens)
    pieces = [tokens[4 * i : 4 * i + 4] for i in range(4)]
    questions = [needles.Question(None, piece, 2) for piece in pieces]
    reading = answers.read(model, needles.Haystack(tokens, questions))
    with torch.no_grad():
        before = reading.logits(model)
        whole = model(torch.tensor([tokens + pieces[3]]), use_cache=False).logits
    torch.testing.assert_close(before[-2:], whole[0, 61:63], atol=1e-4, rtol=1e-3)
    found = answers.train(model, [reading], layers, RetentionPolicy(2, 8), 2)
    with torch.no_grad():
        assert torch.equal(reading.logits(model), before), "the reading is as it was"
    governed = found.value[list(layers.full)]
    assert len(governed.unique()) > 1, "the loss tells the gates apart"
    assert governed.min() > 0 and (found.value > 0).sum() == layers.num_heads
    kept = fraction.best_heads(found, 0.5)
    assert int(kept.sum()) == (layers.num_heads + 1) // 2
    assert not (kept & ~layers.free).any()
