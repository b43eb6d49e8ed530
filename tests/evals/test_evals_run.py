"""``evals.run``: the smoke group on the real model, through the real harness."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs the extra: pip install -e .[eval]")

import torch
from transformers import AutoConfig

from evals import report, reproduce, run, worker
from evals.policies import Policy
from vllm_sink.tools.heads import pattern

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(model_path, tmp_path_factory):
    """Stock attention, the policy, and heads of drawn scores, by the command line."""
    out = tmp_path_factory.mktemp("results")
    config = AutoConfig.from_pretrained(model_path)
    shape = (config.num_hidden_layers, config.num_key_value_heads)
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    pattern.write(out / "heads.tsv", scores, {})
    return out, command(model_path, out)


def arguments(model: str, out: Path) -> list[str]:
    policies = f"dense,sink,heads:{out / 'heads.tsv'}@0.5"
    where = ["--model", model, "--policies", policies, "--out", str(out)]
    return ["--tasks", "sink_smoke", *where]


def command(model: str, out: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "evals.run", *arguments(model, out)],
        cwd=ROOT,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
        text=True,
        capture_output=True,
        timeout=1500,
    )


@pytest.fixture
def run_again(results, model_path, monkeypatch):
    """The same command in this process, which waits for no imports."""
    out, _ = results
    monkeypatch.setattr(sys, "argv", ["evals.run", *arguments(model_path, out)])
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    return run.main


def test_smoke_group_runs_and_is_reported(results):
    out, process = results
    assert process.returncode == 0, process.stdout + process.stderr
    assert "FAILED" not in process.stdout
    saved = json.loads((out / "results.json").read_text())
    assert len(saved["parts"]) == 15
    by_policy = {p["config"]["policy"]["name"]: p for p in saved["parts"]}
    assert len(by_policy) == 3
    for name, part in by_policy.items():
        assert ("SINK" in part["attention_backends"]) == (name != "dense")
    # The last: the head map is not ignored.
    assert [check["ok"] for check in saved["checks"]] == [True] * 5
    assert "different from sink there too" in saved["checks"][-1]["what"]

    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    perplexity = {
        row["name"]: float(row["value"])
        for row in rows
        if row["metric"] == "ppl_to_512"
    }
    assert perplexity["sink"] > perplexity["dense"] > 1
    for row in rows:
        arguments = json.loads(row["engine_args"])
        assert ("attention_backend" in arguments) == (row["name"] != "dense")
    for task in ("ppl", "stream_qa", "passkey", "niah", "chat"):
        assert (out / f"sink_{task}_smoke.png").stat().st_size > 5000
    assert "ppl_to_512" in (out / "results.md").read_text()


def test_a_finished_run_starts_no_engine(results, run_again):
    out, _ = results
    before = {path: path.stat().st_mtime_ns for path in out.glob("parts/*.json")}
    (out / "sink.log").unlink()
    run_again()
    assert not (out / "sink.log").exists()
    after = {path: path.stat().st_mtime_ns for path in out.glob("parts/*.json")}
    assert after == before


def test_stock_attention_passed_off_as_the_policy_fails(results, run_again, capsys):
    """The stock engine's numbers under the policy's name: exit status 1."""
    out, _ = results
    task = "sink_ppl_smoke"
    mine, stock = (worker.part_path(out, name, task) for name in ("sink", "dense"))
    honest = mine.read_text()
    part = json.loads(honest)
    part["samples"] = json.loads(stock.read_text())["samples"]
    mine.write_text(json.dumps(part))
    try:
        with pytest.raises(SystemExit) as ended:
            run_again()
    finally:
        mine.write_text(honest)
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "FAILED: sink, sink_ppl_smoke: different from it beyond" in said


def part(name: str, responses: list[float]) -> dict:
    """A perplexity part of two stretches of 100 tokens."""
    policy = Policy.parse(name, 4, 124)
    return {
        "task": "sink_ppl_smoke",
        "config": {"policy": vars(policy)},
        "samples": [
            {"end": end, "num_tokens": 100, "response": [value, False]}
            for end, value in zip((128, 512), responses, strict=True)
        ],
    }


@pytest.mark.parametrize(
    "responses, ok",
    [
        ([-300.0, -310.0], [True, True]),
        ([-300.0, -300.0], [True, False]),  # nothing evicted
        ([-301.0, -310.0], [False, True]),  # evicted too early
    ],
)
def test_checks(responses, ok):
    parts = [part("dense", [-300.0, -300.0]), part("sink", responses)]
    assert [check["ok"] for check in report.check_policies(parts)] == ok


@pytest.mark.parametrize("response, ok", [(-310.0, True), (-320.0, False)])
def test_a_map_that_is_ignored_fails(response, ok):
    """Beyond S + W it must differ from the plain policy as well."""
    parts = [
        part("dense", [-300.0, -300.0]),
        part("sink", [-300.0, -320.0]),
        part("heads:x/heads.tsv@0.25", [-300.0, response]),
    ]
    checks = report.check_policies(parts)
    assert [check["ok"] for check in checks] == [True, True, True, True, ok]
    assert "different from sink there too" in checks[-1]["what"]


def test_all_heads_are_stock_attention():
    parts = [
        part("dense", [-300.0, -300.0]),
        part("heads:heads.tsv@1", [-300.0, -300.0]),
    ]
    assert report.check_policies(parts) == []


def test_no_stock_attention_no_check():
    checks = report.check_policies([part("sink", [-300.0, -310.0])])
    assert [check["ok"] for check in checks] == [None]


def test_policies():
    assert Policy.parse("dense", 4, 60).engine_args() == {}
    assert Policy.parse("window", 4, 60).window_size == 64
    given = Policy.parse("sink:16+112:absolute", 4, 60)
    assert given.engine_args()["additional_config"]["sink"] == {
        "num_sink_tokens": 16,
        "window_size": 112,
        "sink_positions": "absolute",
    }
    heads = Policy.parse("heads:found/heads.tsv@0.25", 4, 60)
    assert heads.engine_args()["additional_config"]["sink"] == {
        "num_sink_tokens": 4,
        "window_size": 60,
        "sink_positions": "cache",
        "retrieval_heads": "found/heads.tsv",
        "retrieval_fraction": 0.25,
    }
    sized = Policy.parse("heads:a@b.tsv@0.5:2+30:absolute", 4, 60)
    assert (sized.num_sink_tokens, sized.window_size) == (2, 30)
    assert (sized.sink_positions, sized.retrieval_heads) == ("absolute", "a@b.tsv")
    path = worker.part_path(Path("out"), heads.name, "sink_niah")
    assert path.parent == Path("out/parts")
    with pytest.raises(ValueError, match="policy must be dense"):
        Policy.parse("full", 4, 60)


def test_one_command_draws_every_picture_from_the_committed_numbers(
    tmp_path, monkeypatch
):
    committed = ROOT / "evals" / "results"
    for file in committed.glob("*.csv"):
        shutil.copy(file, tmp_path)
    arguments = ["all", "--plot-only", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["evals.reproduce", *arguments])
    reproduce.main()
    drawn = {path.name: path.stat().st_size for path in tmp_path.glob("*.png")}
    assert min(drawn.values()) > 5000
    # By other commands: evals.run, vllm-sink heads, evals.peers.
    others = {"retrieval_niah.png", "heads_fraction.png", "peers.png"}
    assert drawn.keys() == {path.name for path in committed.glob("*.png")} - others


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="tasks must be known to the harness"):
        run.expand_tasks(["sink_smok"])
    assert run.expand_tasks(["sink_smoke", "sink_ppl_smoke"])[0] == "sink_ppl_smoke"
    assert len(run.expand_tasks(["sink_smoke"])) == 5
