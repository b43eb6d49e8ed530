"""What the soak calls wrong: it must be able to fail."""

import pytest

from tests.soak.clients import TIE, SoakFailure, check_refusal, same
from tests.soak.deck import Card, Deck
from tests.soak.faults import Lives


@pytest.fixture
def card() -> Card:
    """Alone it answered 5, 6, 7; of the last the runner-up was as good."""
    return Card("kind", "completions", {}, solo=[([5, 6, 7], [1.0, 2 * TIE, TIE / 2])])


def test_an_answer_is_the_solo_runs_up_to_a_tie(card):
    assert same(card, [5, 6, 7], 0)
    assert not same(card, [5, 6, 9], 0)


@pytest.mark.parametrize("tokens", [[4, 6, 7], [5, 9, 7], [5, 6], [5, 6, 7, 8], []])
def test_another_answer_is_a_failure(card, tokens):
    with pytest.raises(SoakFailure, match="kind"):
        same(card, tokens, 0)


@pytest.mark.parametrize(
    "status, reason, is_fine",
    [(400, "prompt must be shorter", True), (400, "no", False), (500, "x" * 20, False)],
)
def test_a_refusal_is_a_400_with_a_reason(status, reason, is_fine):
    refused = Card("too long", "completions", {}, status=400)
    error = type("Error", (), {"status_code": status, "message": reason})
    if is_fine:
        check_refusal(refused, error)
    else:
        with pytest.raises(SoakFailure):
            check_refusal(refused, error)


def test_a_life_that_fails_is_told_and_the_next_one_is_led(tmp_path, capsys):
    def failing(lives):
        yield "first", "seen"
        raise SoakFailure("left behind: 1 process")

    def good(lives):
        yield "second", "seen"

    lives = Lives("model", [], tmp_path, Deck(1, 1000, 512).cards, None, 1)
    lives.lead([failing, good], lambda: True)
    assert lives.failures == ["failing: SoakFailure: left behind: 1 process"]
    assert set(lives.seen) == {"first", "second"}
    assert "| second | 1 | seen |" in lives.table()
