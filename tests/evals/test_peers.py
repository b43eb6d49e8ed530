"""``evals.peers``: presses get the memory that is counted, and are asked as we are."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib", reason="needs the extra: pip install -e .[eval]")

from transformers import DynamicCache, LlamaForCausalLM

from evals import heads, peers, plots, press_worker
from tests.evals.test_heads import RESULTS
from tests.helpers.random_llama import save_llama
from vllm_sink.tools.heads import needles

LENGTH, NUM_HEADS = 200, 6
# Two haystacks whose longest questions differ, so their contexts do, too.
HAYSTACKS = [
    needles.Haystack(
        tokens=[(7 * i + seed) % 500 for i in range(LENGTH - longest)],
        questions=[
            needles.Question(
                needles.Needle("code", "", "", ""), [seed + j for j in range(n)], 2
            )
            for n in (5, longest)
        ],
    )
    for seed, longest in ((1, 12), (3, 9))
]
# Speaks as press_worker does, and holds what it is told to, over six heads.
STUB = """
import json, sys
job = json.loads(sys.stdin.readline())
print("what a library prints", file=sys.stderr)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["name"] == "SnapKV":
        sys.exit(1)
    sizes = [len(haystack["tokens"]) for haystack in job["haystacks"]]
    questions = sum(len(haystack["questions"]) for haystack in job["haystacks"])
    assert all(kept <= size for kept, size in zip(asked["kept"], sizes))
    told = {"held": [6 * kept for kept in asked["kept"]], "cpu_seconds": [1.0, 2.0],
            "hit": [True] + [False] * (questions - 1), "loss": [0.5] * questions}
    print(json.dumps(told), flush=True)
"""


@pytest.mark.parametrize("num_retrieval", [0, 1, 3, 6])
def test_a_press_gets_the_memory_of_the_heads(num_retrieval, tmp_path, monkeypatch):
    """Of its tokens and the question's, as many pairs as the heads hold."""
    monkeypatch.setattr(heads, "NUM_SINK_TOKENS", 4)
    monkeypatch.setattr(heads, "WINDOW", 46)
    pairs = num_retrieval * LENGTH + (NUM_HEADS - num_retrieval) * 50
    share = heads.kv_share(num_retrieval / NUM_HEADS, LENGTH)
    assert share == pytest.approx(pairs / (NUM_HEADS * LENGTH))
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    monkeypatch.setattr(peers, "WORKER", stub)
    with peers.PressWorker(sys.executable, "model", HAYSTACKS) as worker:
        row = peers.measure_press(worker, HAYSTACKS, LENGTH, share, NUM_HEADS, "KVzip")
        with pytest.raises(RuntimeError, match="ended, measuring SnapKV"):
            peers.measure_press(worker, HAYSTACKS, LENGTH, share, NUM_HEADS, "SnapKV")
    assert abs(row["kv_share"] - share) <= 0.5 / LENGTH + 1e-4, "half a token, rounded"
    assert (row["hits"], row["answer_loss"]) == (1, 0.5)
    assert row["cpu_seconds_to_read"] == 1.5


def test_a_share_below_the_question_is_refused():
    assert peers.tokens_kept(0.5, 190, 200) == 90
    assert peers.tokens_kept(1.0, 190, 200) == 190
    with pytest.raises(ValueError, match="--length must leave a press some"):
        peers.tokens_kept(0.05, 190, 200)


@pytest.mark.parametrize("num_tokens", [1, 97, 1000])
def test_the_ratio_keeps_that_many_tokens(num_tokens):
    """By kvpress's own rule, which cuts a product of floats."""
    for kept in range(1, num_tokens + 1):
        ratio = press_worker.ratio_for(kept, num_tokens)
        assert max(1, int(num_tokens * (1 - ratio))) == kept


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return LlamaForCausalLM.from_pretrained(
        save_llama(tmp_path_factory.mktemp("llama"))
    ).eval()


def test_without_a_press_the_answers_are_those_of_full_attention(model):
    for haystack in HAYSTACKS:
        wanted = needles.ask(model, haystack)
        read = {
            "tokens": haystack.tokens,
            "questions": [(q.tokens, q.num_answer) for q in haystack.questions],
        }
        told = press_worker.measure(model, [read], "none", [len(haystack.tokens)])
        assert told["loss"] == pytest.approx([a.loss for a in wanted], abs=1e-4)
        assert told["hit"] == [a.hit for a in wanted]
        assert told["held"] == [NUM_HEADS * len(haystack.tokens)]


def test_what_is_masked_or_cut_is_not_held(model, monkeypatch):
    """AdaKV and KVzip mask, others cut; a question leaves the cache as it was."""
    tokens = HAYSTACKS[0].tokens

    @contextmanager
    def keep_the_first_ten(model):
        yield
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :10], layer.values[:, :, :10]

    cache = DynamicCache()
    monkeypatch.setattr("transformers.DynamicCache", lambda: cache)
    press_worker.read(model, tokens, keep_the_first_ten)
    attentions = [SimpleNamespace() for _ in cache.layers]
    assert press_worker.pairs_held(cache, attentions) == NUM_HEADS * 10
    attentions[1].masked_key_indices = ([0, 0, 0], [0, 1, 1], [4, 5, 6])
    assert press_worker.pairs_held(cache, attentions) == NUM_HEADS * 10 - 3
    questions = [([1, 2, 3, 4], 2), ([5, 6, 7], 1)]
    asked = press_worker.ask(model, cache, len(tokens), questions)
    alone = [press_worker.ask(model, cache, len(tokens), [q])[0] for q in questions]
    near = press_worker.ask(model, cache, 10, questions)
    assert press_worker.pairs_held(cache, attentions) == NUM_HEADS * 10 - 3
    for one, other, elsewhere in zip(asked, alone, near, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4)
        assert abs(one[0] - elsewhere[0]) > 1e-3, "asked at its true positions"


def test_an_environment_that_is_missing_is_refused_with_how_to_make_it(tmp_path):
    for python in (tmp_path / "none", "/bin/false"):
        with pytest.raises(ValueError, match="--press-python must be") as error:
            peers.press_version(python)
        assert "-m venv .venv-kvpress && " in str(error.value)
        assert "kvpress==" in str(error.value)
    code = "#!/bin/sh\necho 0.5.5\n"
    python = tmp_path / "python"
    python.write_text(code)
    python.chmod(0o755)
    assert peers.press_version(python) == "0.5.5"


def test_committed_rows_are_of_equal_memory_and_of_one_haystack():
    rows = plots.read(RESULTS / "peers.csv")
    full = [row for row in rows if row["method"] == peers.FULL]
    assert len({row["program"] for row in full}) == 2
    assert len({row["hits"] for row in full}) == 1, "both programs find the same"
    (known,) = [
        row
        for row in plots.read(RESULTS / "heads.csv")
        if row["length"] == full[0]["length"] and float(row["fraction"]) == 1
    ]
    for name in ("hits", "num_needles", "texts", "heads_from"):
        assert known[name] == full[0][name], "the same haystacks"
    ours = {
        float(row["memory_of_fraction"]): float(row["kv_share"])
        for row in rows
        if row["method"] == peers.RETRIEVAL
    }
    assert set(ours) == set(peers.FRACTIONS)
    by_share = {share: [] for share in ours}
    for row in rows:
        share = float(row["memory_of_fraction"])
        if row["method"] in peers.PRESSES and share in ours:
            by_share[share].append(row["method"])
            assert abs(float(row["kv_share"]) - ours[share]) < 0.002
    for measured in by_share.values():
        assert sorted(measured) == sorted(peers.PRESSES)
