"""``evals.reproduce heads``: its choice of heads, and rows that survive a stop."""

import csv
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs the extra: pip install -e .[eval]")

from evals import heads, layers, plots
from vllm_sink.policy.config import SinkConfig
from vllm_sink.tools.heads.attention import Layers
from vllm_sink.tools.heads.scores import Scores

RESULTS = Path(__file__).parents[2] / "evals" / "results"


@pytest.fixture
def found() -> Scores:
    """Eight layers of three heads; layer 5 has the best three."""
    value = torch.arange(24).view(8, 3).flip(0) / 100.0
    value[5] = torch.tensor([0.9, 0.8, 0.7])
    return Scores(value, {}, Layers(8, 3, tuple(range(8))))


def test_baselines_have_as_many_heads(found):
    for how, share, kept in heads.choices(found):
        if kept is None:
            assert (how, share) == ("found", 1.0)
            continue
        assert int(kept.sum()) == int(share * 24 + 0.5)
        assert how != "whole layers" or set(kept.sum(1).tolist()) <= {0, 3}
    assert heads.best_layers(found, 0.25).sum(1).nonzero().flatten().tolist() == [0, 5]
    random, other = (heads.random_heads(found, 0.5, seed) for seed in (0, 1))
    assert torch.equal(random, heads.random_heads(found, 0.5, 0))
    assert not torch.equal(random, other)


def test_memory_share():
    assert heads.kv_share(1.0, 2048) == 1
    assert heads.kv_share(0.0, 2048) == 0.125
    assert heads.kv_share(0.25, 2048) == pytest.approx(0.34375)
    assert heads.kv_share(0.25, 100) == 1


def test_a_row_is_measured_once(tmp_path):
    path = tmp_path / "rows.csv"
    calls = []

    def measure():
        calls.append(1)
        return {"hits": len(calls)}

    for fraction in (0.25, 0.5):
        heads.Rows(path).add({"fraction": fraction}, measure)
    again = heads.Rows(path)
    again.add({"fraction": 0.25}, measure)
    assert len(calls) == 2
    assert [row["hits"] for row in again.rows] == ["1", "2"]


def test_committed_needles_are_at_least_a_hundred_a_cell():
    rows = plots.read(RESULTS / "heads.csv")
    assert min(int(row["num_needles"]) for row in rows) >= 100
    lengths = {row["length"] for row in rows}
    assert lengths == {"512", "1024", "2048"}
    for length in lengths:
        here = {
            (r["heads"], float(r["fraction"])): int(r["hits"]) / int(r["num_needles"])
            for r in rows
            if r["length"] == length
        }
        assert len(here) == 10, "six fractions, two baselines at two each"
        full = here["found", 1.0]
        # Chance is none; this model finds 41% at 2,048 tokens.
        assert full > 0.4, "full attention can do it"
        assert here["found", 0.0] <= 0.05
        assert here["found", 0.25] >= 0.7 * full


def test_committed_scores_are_stable():
    with (RESULTS / "heads_stability.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert min(float(row["rank_correlation"]) for row in rows) >= 0.95


def test_committed_methods_say_why_the_default_is_the_default():
    with (RESULTS / "heads_methods.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found: dict[str, dict] = {}
    for row in rows:
        if row["num_needles"] == "104":
            cell = row["fraction"], row["length"]
            found.setdefault(row["method"], {})[cell] = int(row["hits"])
    other = {
        (row["fraction"], row["length"]): int(row["hits"])
        for row in plots.read(RESULTS / "heads.csv")
        if row["heads"] == "found"
    }
    gates = found["answers"]
    assert {share for share, _ in gates} >= {"0.1", "0.25"} and len(gates) >= 4
    assert {cell[0] for cell in found["duo"]} >= {"0.25"}
    for cell, hits in gates.items():
        share, length = cell
        full = other["1.0", length]
        if share != "0.5":  # which tells the methods hardly apart
            assert hits > other[cell], "more than the recipe"
        assert hits > found["duo"].get(cell, 0), "more than DuoAttention's gates"
        assert hits >= {"0.1": 0.6, "0.25": 0.9, "0.5": 0.9}[share] * full


def test_every_choice_of_layers_has_an_engine_and_a_row():
    """With both sink positions, beside stock attention."""
    found = {}
    for name, policy in layers.engine_policies((5, 11, 17)):
        config = SinkConfig.from_additional_config(
            policy.engine_args().get("additional_config")
        )
        chosen = " ".join(map(str, config.retrieval_layers or ()))
        found[name, policy.sink_positions or ""] = chosen
    assert len(found) == 1 + 2 * 8 and found.pop(("dense", "")) == ""
    assert all(name == chosen for (name, _), chosen in found.items())
    with (RESULTS / "heads_layers_engine.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    told = {(row["retrieval_layers"], row["sink_positions"]) for row in rows}
    assert told == {("dense", ""), *found}
