"""``vllm-sink heads``: its files, its words, its refusals."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MistralConfig

from tests.helpers.random_llama import save_llama
from vllm_sink.policy import head_map
from vllm_sink.policy.config import SinkConfig
from vllm_sink.settings import pattern_files
from vllm_sink.settings.resolve import resolved
from vllm_sink.tools import cli, serve_command
from vllm_sink.tools.heads import (
    answers,
    attention,
    duo,
    fraction,
    pattern,
    scores,
    texts,
)

SHAPE = head_map.ModelShape(
    num_layers=30,
    num_kv_heads=3,
    num_heads=9,
    facts=(("model_type", "llama"), ("hidden_size", 576), ("num_attention_heads", 9)),
    name="SmolLM2",
)


def read_back(path) -> torch.Tensor:
    """[L, HKV] bool as the plugin takes it, with no fraction given."""
    config = resolved(SinkConfig(retrieval_heads=str(path)), SHAPE)
    return torch.tensor(config.retrieval_heads).bool()


def run(capsys, *arguments: str) -> str:
    status = cli.main(["heads", *arguments])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


@pytest.fixture
def no_start(monkeypatch):
    """The engine that is asked whether the command starts says yes."""
    monkeypatch.setattr(serve_command, "refusal", lambda command: None)


@pytest.fixture
def few_fractions(monkeypatch):
    monkeypatch.setattr(fraction, "FRACTIONS", (0.0, 0.25, 0.5))


def test_auto(model_path, tmp_path, capsys, few_fractions, no_start):
    """Files, pictures and words agree; what is written is read back."""
    pytest.importorskip("matplotlib", reason="needs the extra: pip install -e .[eval]")
    out = tmp_path / "found" / "heads.tsv"
    sizes = ["--needle-tokens", "384", "--window-size", "124", "--haystacks", "2"]
    sizes += ["--method", "recipe"]
    printed = run(capsys, "--model", model_path, "--out", str(out), *sizes)
    config = json.loads((out.parent / "heads.tsv.meta.json").read_text())
    curve = config["curve"]
    points = {point["fraction"]: point for point in curve["points"]}
    tried = [share for share in (0.0, 0.25, 0.5) if share <= curve["chosen"]]
    assert sorted(points) == [*tried, 1.0], "up to the chosen one"
    assert points[1.0]["num_needles"] == 16
    assert points[0.0]["hits"] <= 0.1 < points[1.0]["hits"]
    assert points[0.0]["loss"] > points[1.0]["loss"] + 1
    assert curve["chosen"] in (0.25, 0.5)
    assert points[curve["chosen"]]["loss"] <= points[1.0]["loss"] + fraction.MARGIN

    kept = read_back(out)
    count = int(kept.sum())
    assert count == {0.25: 23, 0.5: 45}[curve["chosen"]]
    assert f"{count} of them" in printed and "<- chosen" in printed
    assert f'"retrieval_heads": "{out}"' in printed
    assert (config["sink_size"], config["recent_size"]) == (4, 124)
    assert config["method"] == "recipe" and config["text"] == "pydoc_data.topics"
    for picture in ("heads.png", "heads_curve.png"):
        assert (out.parent / picture).stat().st_size > 5000
    assert config["files"] == ["heads.tsv", "heads.png", "heads_curve.png"]


def test_a_given_fraction_and_json(model_path, tmp_path, capsys, monkeypatch):
    """A file of the user's own, one step of the default; JSON and nothing else."""
    monkeypatch.setattr(answers, "LONGER", 1)
    text = tmp_path / "mine.txt"
    text.write_text(texts.python_prose()[:60_000])
    out = tmp_path / "mine.tsv"
    arguments = ["--text", str(text), "--out", str(out), "--fraction", "0.1", "--json"]
    arguments += ["--steps", "1", "--needle-tokens", "320", "--window-size", "60"]
    result = json.loads(run(capsys, "--model", model_path, *arguments))
    assert len(result["heads"]) == 9 and result["curve"] is None
    assert result["method"] == "answers" and list(result["measured"]) == [
        "gate",
        "echo",
        "induction",
    ]
    assert read_back(out).nonzero().tolist() == result["heads"]
    assert result["text"] == "mine.txt" and len(result["text_sha256"]) == 16
    # The best nine: those of the scores.
    best = np.argsort(-np.array(result["scores"]).flatten())[:9]
    assert sorted(best.tolist()) == [3 * i + head for i, head in result["heads"]]


def test_files_are_as_numpy_writes_them(tmp_path):
    torch.manual_seed(0)
    values = torch.rand(30, 3)
    beside = pattern.write(tmp_path / "heads.tsv", values, {"retrieval_fraction": 0.3})
    mine = (tmp_path / "heads.tsv").read_text()
    np.savetxt(tmp_path / "numpy.tsv", values.double().numpy(), delimiter="\t")
    assert mine == (tmp_path / "numpy.tsv").read_text()
    assert beside == tmp_path / "heads.tsv.meta.json"
    assert read_back(tmp_path / "heads.tsv").sum() == 27


class TestNothingIsOverwritten:
    """But what the tool wrote itself."""

    def refused(self, out, message):
        before = {file: file.read_bytes() for file in out.parent.iterdir()}
        with pytest.raises(ValueError, match=message):
            pattern.write(out, torch.ones(2, 2), {}, [out.with_suffix(".png")])
        assert before == {file: file.read_bytes() for file in out.parent.iterdir()}

    def test_a_models_folder(self, tmp_path):
        """Its config.json stays, and is no pattern's."""
        config = {"model_type": "llama", "hidden_size": 1, "architectures": ["L"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        for _ in range(2):  # its own it writes again
            pattern.write(
                tmp_path / "heads.tsv", torch.rand(30, 3), {"retrieval_fraction": 0.1}
            )
        assert json.loads((tmp_path / "config.json").read_text()) == config
        assert read_back(tmp_path / "heads.tsv").sum() == 9

    @pytest.mark.parametrize("name", ["heads.tsv", "heads.tsv.meta.json", "heads.png"])
    def test_files_of_others(self, tmp_path, name):
        (tmp_path / name).write_text("{}")
        self.refused(tmp_path / "heads.tsv", f"overwrite .* got .*/{name}', which exi")

    def test_a_pattern_that_was_changed(self, tmp_path):
        out = tmp_path / "heads.tsv"
        pattern.write(out, torch.rand(2, 2), {})
        out.write_text("1 0\n0 1\n")
        self.refused(out, "that was changed since vllm-sink heads wrote it")

    def test_two_patterns_share_no_picture(self, tmp_path):
        png = tmp_path / "heads.png"
        pattern.write(tmp_path / "heads.txt", torch.rand(2, 2), {}, [png])
        png.write_text("drawn")
        self.refused(tmp_path / "heads.tsv", r"got .*heads.png', which exists")

    def test_what_could_not_be_read_back(self, tmp_path):
        self.refused(tmp_path / "config.json", r"--out must end in .tsv or .txt")
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match=r"in a folder, got .* '.*file' is a file"):
            pattern.write(tmp_path / "file" / "a" / "heads.tsv", torch.ones(2, 2), {})


def test_the_printed_command_starts(model_path, tmp_path, capsys, monkeypatch):
    """Whatever the paths are; the tool itself has asked an engine's start."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    from vllm_sink.plugin.compat import parse_serve_arguments

    model = tmp_path / 'it\'s a "model"'
    model.symlink_to(Path(model_path).resolve())
    out = tmp_path / "my heads" / "it's.tsv"
    asked = []
    real = serve_command.refusal
    monkeypatch.setattr(
        serve_command, "refusal", lambda command: asked.append(real(command))
    )
    arguments = ["--model", str(model), "--out", str(out), "--fraction", "0.1"]
    printed = run(capsys, *arguments, "--method", "recipe")
    assert asked == [None], "it would start"
    command = printed.partition("  vllm serve ")[2].replace("\\\n", "")
    name, *flags = shlex.split(command)
    assert name == str(model)
    engine_args = AsyncEngineArgs.from_cli_args(parse_serve_arguments(name, flags))
    section = engine_args.create_engine_config().additional_config["sink"]
    assert np.sum(section["retrieval_heads"]) == 9


def test_a_command_that_would_not_start_is_not_printed(tmp_path):
    MistralConfig(
        sliding_window=64, architectures=["MistralForCausalLM"]
    ).save_pretrained(tmp_path)
    command = serve_command.serve_command(str(tmp_path), {"window_size": 60}, "main")
    (told,) = serve_command.advice("Serve it so:", command)
    assert "vllm serve" not in told
    assert "layers all keep a window of 64 tokens; drop --attention-backend" in told


def test_a_checkpoint_without_all_weights_is_refused(model_path, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    save_llama(tmp_path)
    for file in Path(model_path).glob("*token*"):
        shutil.copy(file, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = weights.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    out = tmp_path / "heads.tsv"
    assert cli.main(["heads", "--model", str(tmp_path), "--out", str(out)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{str(tmp_path)!r} with no model.layers.1.self_attn.q_proj.weight" in error
    assert not out.exists()
    weights["model.layers.1.self_attn.q_proj.weight"] = lost[:1].clone()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert cli.main(["heads", "--model", str(tmp_path), "--out", str(out)]) == 1
    assert str(tmp_path) in capsys.readouterr().err.strip().splitlines()[-1]
    assert not out.exists()


def test_every_format_gives_the_same_map(tmp_path):
    """TSV, KVzip's tensor, JSON, and Wu et al.'s query heads."""
    torch.manual_seed(0)
    values = torch.rand(30, 3)
    folders = [tmp_path / name for name in ("tsv", "pt", "json", "query")]
    for folder in folders:
        folder.mkdir()
    pattern.write(folders[0] / "x.tsv", values, {})
    torch.save(values, folders[1] / "x.pt")
    (folders[2] / "x.json").write_text(json.dumps(values.tolist()))
    query = {
        f"{layer}-{head}": [float(values[layer, head // 3]) * (head % 3 == 1)] * 2
        for layer in range(30)
        for head in range(9)
    }
    (folders[3] / "x.json").write_text(json.dumps(query))
    maps = [
        head_map.select(pattern_files.read_scores(str(f / f"x.{kind}"), SHAPE), 0.25)
        for f, kind in zip(folders, ("tsv", "pt", "json", "json"), strict=True)
    ]
    assert maps[0].num_retrieval_heads == 23
    assert all(other == maps[0] for other in maps)


def test_gates_separate_what_the_prompts_need(model_path):
    """DuoAttention's optimisation: few steps already order the heads.

    Its gates agree with the recipe far better than chance: of a random half of the
    heads, half would be among the recipe's best.
    """
    model, tokenizer = attention.load(model_path)
    layers = attention.inspect(model, list(range(10, 18)))
    text = texts.python_prose()
    policy = fraction.RetentionPolicy(4, 60)
    gates = duo.find(model, tokenizer, text, layers, policy, 256, steps=4)
    assert gates.value.min() > 0 and gates.value.max() <= 1
    assert len(gates.value.unique()) > 60
    recipe = scores.find(model, tokenizer, text, layers)
    best = fraction.best_heads(recipe, 0.1)
    assert (best & fraction.best_heads(gates, 0.5)).sum() >= 7


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--text", "nowhere.txt"], "--text must be a readable text file"),
        (["--needle-tokens", "300"], "--needle-tokens must be at least"),
        (["--device", "nowhere"], "nowhere"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
    ],
)
def test_refused(model_path, tmp_path, capsys, arguments, message):
    out = tmp_path / "heads.tsv"
    assert cli.main(["heads", "--model", model_path, "--out", str(out), *arguments])
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_fraction_is_a_number_or_auto(capsys):
    with pytest.raises(SystemExit):
        cli.main(["heads", "--model", "m", "--fraction", "2"])
    assert "must be auto or a number from 0 to 1" in capsys.readouterr().err
