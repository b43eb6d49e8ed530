"""The finder on a model whose heads are known, and on the real one."""

import itertools
import random

import pytest
import torch

from tests.helpers import copying_llama
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.tools.heads import answers, attention, needles, scores, texts


@pytest.fixture(scope="module")
def smollm(model_path):
    model, tokenizer = attention.load(model_path)
    layers = attention.inspect(model, list(range(10, 18)))
    return model, tokenizer, layers


@pytest.fixture(scope="module")
def found(smollm):
    model, tokenizer, layers = smollm
    return scores.find(model, tokenizer, texts.python_prose()[:120_000], layers)


@pytest.mark.parametrize("opening", [[], [0]])
def test_known_heads_are_found_exactly(opening):
    """Two echo and two induction heads come first; what else there is, after."""
    attention.register()
    model = copying_llama.build(attention.NAME)
    passage = random.Random(0).sample(range(1, copying_llama.VOCAB), 100)
    layers = attention.inspect(model, passage)
    assert layers == attention.Layers(4, 2, (0, 1, 2, 3))
    echo, induction = scores.echo_and_induction(model, passage, layers, opening)
    for layer in range(4):
        for head in range(4):
            # The other equal token of an echo head is the query itself: half each.
            if (layer, head) in copying_llama.ECHO_HEADS:
                assert echo[layer, head] > 0.45
            else:
                assert echo[layer, head] < 0.05
            if (layer, head) in copying_llama.INDUCTION_HEADS:
                assert induction[layer, head] > 0.9
            else:
                assert induction[layer, head] < 0.05
    by_group = [x.view(4, 2, 2).amax(2) for x in (echo, induction)]
    ranked = scores.combine(*by_group, layers)
    known = {*copying_llama.ECHO_HEADS, *copying_llama.INDUCTION_HEADS}
    assert set(ranked.order()[:4]) == {(layer, head // 2) for layer, head in known}


def test_shares_equal_the_models_own_attentions(smollm, model_path, prose):
    """Query by query, from the weights that eager attention returns."""
    from transformers import AutoModelForCausalLM

    model, _, layers = smollm
    passage = prose[100:160]
    echo, induction = scores.echo_and_induction(model, passage, layers, [])
    eager = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        tokens = torch.tensor([passage * 2])
        weights = torch.stack(eager(tokens, output_attentions=True).attentions)[:, 0]
    late = range(60, 119)  # the last token has no successor in the first copy
    same = torch.stack([weights[:, :, q, q - 60] for q in late]).mean(0)
    after = torch.stack([weights[:, :, q, q - 59] for q in late]).mean(0)
    torch.testing.assert_close(echo, same, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(induction, after, atol=1e-5, rtol=1e-3)


def test_deterministic(smollm, found):
    model, tokenizer, layers = smollm
    again = scores.find(model, tokenizer, texts.python_prose()[:120_000], layers)
    assert torch.equal(again.value, found.value)


def test_disjoint_texts_agree(smollm, found):
    model, tokenizer, layers = smollm
    other = scores.find(model, tokenizer, texts.python_prose()[120_000:], layers)
    assert not torch.equal(other.value, found.value), "another text was read"
    assert scores.rank_correlation(found.value, other.value) >= 0.95


def test_the_better_rank_counts_and_induction_breaks_ties():
    layers = attention.Layers(2, 2, (0, 1))
    echo = torch.tensor([[0.9, 0.1], [0.2, 0.3]])
    induction = torch.tensor([[0.0, 0.8], [0.5, 0.1]])
    # Ranks by echo: 00 11 10 01; by induction: 01 10 11 00.
    ranked = scores.combine(echo, induction, layers)
    assert ranked.order() == [(0, 1), (0, 0), (1, 0), (1, 1)]
    assert ranked.value.tolist() == [[0.75, 1.0], [0.5, 0.25]]


def test_layers_without_a_choice_score_nothing():
    layers = attention.Layers(2, 2, (1,))
    values = torch.tensor([[0.9, 0.8], [0.2, 0.3]])
    ranked = scores.combine(values, values, layers)
    assert ranked.order() == [(1, 1), (1, 0)]
    assert ranked.value[0].tolist() == [0, 0]


def copied(model, length: int) -> answers.Reading:
    """A passage that is read, and eight pieces of its beginning to go on with."""
    passage = random.Random(1).sample(range(1, copying_llama.VOCAB), length)
    pieces = [passage[4 * i : 4 * i + 4] for i in range(8)]
    questions = [needles.Question(None, piece, 2) for piece in pieces]
    return answers.read(model, needles.Haystack(passage, questions))


@pytest.fixture(scope="module")
def answering():
    """A model of which one head foretells, and that head's (layer, KV head)."""
    attention.register()
    model = copying_llama.build(attention.NAME)
    layer, head = copying_llama.INDUCTION_HEADS[1]
    copying_llama.let_answer(model, layer, head)
    return model, (layer, head // 2)


def test_the_gate_of_the_head_that_answers_stays_open(answering):
    model, known = answering
    reading = copied(model, 100)
    assert all(reading.hits(model)), "full attention answers"
    layers = attention.inspect(model, list(range(1, 9)))
    policy = RetentionPolicy(0, 8)
    found = answers.train(model, [reading], layers, policy, 16)
    (best, second, *_) = found.order()
    assert best == known
    assert found.value[best] > 0.7
    assert found.value[second] < 0.4, "the others close"
    # The reading is as it was.
    assert all(reading.hits(model))
    again = answers.train(model, [reading], layers, policy, 16)
    assert torch.equal(again.value, found.value)


def test_a_head_that_answers_need_comes_into_the_first_quarter(answering):
    """In the place of one that they don't need; the surest stay, and so does it."""
    model, known = answering
    reading = copied(model, 100)
    layers = attention.inspect(model, list(range(1, 9)))
    others = [(i, h) for i in range(4) for h in range(2) if (i, h) != known]
    last = scores.ranked([*others, known], {}, layers)
    found = answers.exchanged(model, [reading], last, RetentionPolicy(0, 8))
    assert found.order() == [others[0], known, *others[1:]]
    again = answers.exchanged(model, [reading], found, RetentionPolicy(0, 8))
    assert torch.equal(again.value, found.value)
    # Nothing is lost by what is in vain.
    every = torch.ones(4, 2, dtype=torch.bool)
    loss = reading.loss(model, RetentionPolicy(0, 8), every)
    chosen = answers._opened(found.order()[:2], found.value).bool()
    assert reading.loss(model, RetentionPolicy(0, 8), chosen) < loss + 0.1
    assert reading.loss(model, RetentionPolicy(0, 8), every & ~chosen) > loss + 1


def test_the_gates_are_pushed_ever_harder():
    weights = [answers.pressure(step, 5) for step in range(5)]
    assert (weights[0], weights[-1]) == pytest.approx(answers.PRESSURE)
    ratios = [b / a for a, b in itertools.pairwise(weights)]
    assert ratios == pytest.approx([ratios[0]] * 4) and ratios[0] > 1
    assert answers.pressure(0, 1) == answers.PRESSURE[0]


def test_a_model_that_answers_nothing_is_told_the_recipe(smollm, monkeypatch):
    model, tokenizer, layers = smollm
    monkeypatch.setattr(answers.Reading, "hits", lambda self, model: [False] * 8)
    policy = RetentionPolicy(4, 60)
    with pytest.raises(ValueError, match="got 0 of 8; use --method recipe"):
        prose = texts.python_prose()
        answers.find(model, tokenizer, prose, layers, policy, 256, steps=1)


def test_a_layer_follows_the_one_whose_keys_it_reads(monkeypatch):
    """The larger value of the two counts, and the reader obeys the owner's map."""
    attention.register()
    model = copying_llama.build(attention.NAME)
    reader = model.model.layers[3].self_attn
    reader.is_kv_shared_layer = True
    config = reader.config
    monkeypatch.setattr(config, "layer_types", ["full_attention"] * 4, raising=False)
    monkeypatch.setattr(config, "num_kv_shared_layers", 1, raising=False)
    passage = random.Random(0).sample(range(1, copying_llama.VOCAB), 100)
    layers = attention.inspect(model, passage)
    assert (layers.full, layers.readers) == ((0, 1, 2), ((3, 2),))
    assert layers.num_heads == 6
    echo, induction = scores.echo_and_induction(model, passage, layers, [])
    assert not echo[3].any() and not induction[3].any()
    assert echo[2, 1] > 0.45, "layer 3's echo head"
    assert induction[2, 0] > 0.9 and induction[2, 2] > 0.9, "each layer's"
    seen = []
    plain = attention.AttentionCall.plain
    monkeypatch.setattr(
        attention.AttentionCall,
        "plain",
        lambda call, **kw: seen.append(call.num_kv_heads) or plain(call, **kw),
    )
    kept = torch.zeros(4, 2, dtype=torch.bool)
    kept[2, 0] = True
    with attention.Headwise(policy=RetentionPolicy(0, 8), retrieval=kept):
        model(torch.tensor([passage]), use_cache=False)
    assert seen == [1, 1], "layer 2's head and layer 3's, that follows it"


def test_one_score_goes_on_with_another():
    layers = attention.Layers(2, 4, (1,))
    one = torch.tensor([[0.0] * 4, [0.1, 0.2, 0.3, 0.9]])
    other = torch.tensor([[0.0] * 4, [0.5, 0.8, 0.6, 0.7]])
    first, rest = (scores.Scores(v, {n: v}, layers) for v, n in ((one, 1), (other, 2)))
    found = scores.continued(first, rest, 0.5)
    assert found.order() == [(1, 3), (1, 2), (1, 1), (1, 0)]
    assert scores.continued(first, rest, 0.25).order()[1:] == [(1, 1), (1, 2), (1, 0)]
    assert found.value[1].tolist() == [0.25, 0.5, 0.75, 1.0]
    assert not found.value[0].any() and list(found.measured) == [1, 2]


def test_rank_correlation():
    one = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert scores.rank_correlation(one, 10 * one) == pytest.approx(1)
    assert scores.rank_correlation(one, -one) == pytest.approx(-1)
    other = torch.tensor([[2.0, 1.0], [3.0, 4.0]])
    assert scores.rank_correlation(one, other) == pytest.approx(0.8)
