"""Needles: their places, their questions, and the heads that find them."""

import pytest
import torch

from vllm_sink.policy.head_map import num_chosen
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.tools.heads import attention, fraction, needles, scores, texts
from vllm_sink.tools.heads.fraction import Point


@pytest.fixture(scope="module")
def smollm(model_path):
    return attention.load(model_path)


@pytest.fixture(scope="module")
def haystack(smollm):
    return needles.make(smollm[1], texts.python_prose(), 400, 128, "test")


def find(part: list[int], whole: list[int]) -> int:
    """Where ``part`` starts in ``whole``; there once."""
    places = [i for i in range(len(whole)) if whole[i : i + len(part)] == part]
    assert len(places) == 1
    return places[0]


@pytest.mark.parametrize("length, window", [(400, 128), (512, 252), (700, 100)])
def test_every_needle_is_beyond_the_window(smollm, length, window):
    _, tokenizer = smollm
    made = needles.make(tokenizer, texts.python_prose(), length, window, 0)
    longest = max(len(question.tokens) for question in made.questions)
    assert len(made.tokens) + longest == length
    policy = RetentionPolicy(0, window)
    places = []
    for question in made.questions:
        sentence = texts.encode(tokenizer, f"\n\n{question.needle.sentence}\n\n")
        start = find(sentence, made.tokens)
        places.append(start)
        # The first token of a question is the one that sees most of it.
        assert not policy.sees(len(made.tokens), start + len(sentence) - 1)
        answer = question.tokens[-question.num_answer :]
        assert tokenizer.decode(answer) == question.needle.answer
    assert places == sorted(places) and places[0] > 0
    assert places[-1] > (length - window) / 2, "spread over what is allowed"
    kinds = [question.needle.kind for question in made.questions]
    assert kinds == ["fruit", "code"] * 4


def test_seeds(smollm):
    _, tokenizer = smollm
    text = texts.python_prose()
    one, again, other = (needles.make(tokenizer, text, 400, 128, s) for s in (0, 0, 1))
    assert one == again and one.tokens != other.tokens


def test_refused_where_nothing_would_be_hidden(smollm):
    _, tokenizer = smollm
    with pytest.raises(ValueError, match="--needle-tokens must be at least"):
        needles.make(tokenizer, texts.python_prose(), 300, 252, 0)
    with pytest.raises(ValueError, match="--text must hold passages"):
        needles.make(tokenizer, "A few words. Only these.", 512, 252, 0)
    with pytest.raises(ValueError, match="--text must hold at least"):
        texts.passages(tokenizer, "A few words. Only these.", 2, 320)


@pytest.mark.parametrize("policy", [None, RetentionPolicy(4, 128)])
def test_answers_equal_a_forward_pass_of_each_question(smollm, haystack, policy):
    """Shared haystack, padded batch: the same as eight whole prompts."""
    model, _ = smollm
    retrieval = torch.zeros(30, 3, dtype=torch.bool)
    retrieval[::2, 1] = True
    answers = needles.ask(model, haystack, policy, retrieval)
    if policy is not None:
        prefix = needles.read_prefix(model, haystack, policy)
        for _ in range(2):  # the prefix can be used again
            again = needles.ask(model, haystack, policy, retrieval, prefix)
            assert [a.hit for a in again] == [a.hit for a in answers]
            losses = [a.loss for a in again]
            assert losses == pytest.approx([a.loss for a in answers], abs=2e-3)
    for question, answer in list(zip(haystack.questions, answers, strict=True))[::5]:
        tokens = torch.tensor([haystack.tokens + question.tokens])
        with (
            torch.inference_mode(),
            attention.Headwise(policy=policy, retrieval=retrieval),
        ):
            logits = model(tokens, use_cache=False).logits[0]
        count = question.num_answer
        logprobs = logits[-count - 1 : -1].log_softmax(-1)
        wanted = tokens[0, -count:]
        loss = -logprobs.gather(1, wanted[:, None]).mean()
        assert answer.loss == pytest.approx(float(loss), abs=2e-3)
        assert answer.hit == bool((logprobs.argmax(-1) == wanted).all())


def test_full_attention_finds_what_streaming_loses(smollm, haystack):
    model, _ = smollm
    full = needles.ask(model, haystack)
    streaming = needles.ask(model, haystack, RetentionPolicy(4, 128))
    assert sum(answer.hit for answer in full) >= 4
    assert sum(answer.hit for answer in streaming) == 0


def test_number_of_heads():
    assert [num_chosen(f, 90) for f in (0, 0.25, 0.33, 1)] == [
        0,
        23,
        30,
        90,
    ]
    layers = attention.Layers(2, 2, (0, 1))
    values = torch.tensor([[0.5, 0.9], [0.5, 0.1]])
    found = scores.Scores(values, {}, layers)
    # Ties by layer, then head; 3/8 of 4 heads are 1.5, rounded up.
    assert fraction.best_heads(found, 0.375).tolist() == [[True, True], [False, False]]


FULL = Point(1.0, 90, 0.70, 0.75, 40)


@pytest.mark.parametrize(
    "losses, hits, chosen",
    [
        ((5.0, 1.0, 0.79, 0.75), (0.0, 0.6, 0.70, 0.72), 0.25),
        ((5.0, 0.79, 0.79, 0.75), (0.0, 0.5, 0.70, 0.72), 0.25),  # hits don't confirm
        ((0.7, 0.7, 0.70, 0.70), (0.7, 0.7, 0.70, 0.70), 0.0),
        ((5.0, 1.0, 0.81, 0.90), (0.0, 0.6, 0.70, 0.72), None),
    ],
)
def test_the_smallest_that_is_enough(losses, hits, chosen):
    points = [
        Point(f, int(90 * f), loss, hit, 40)
        for f, loss, hit in zip((0.0, 0.1, 0.25, 0.5), losses, hits, strict=True)
    ]
    found = fraction.choose(points, FULL)
    assert (None if found is None else found.fraction) == chosen
