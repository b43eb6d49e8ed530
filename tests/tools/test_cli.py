"""``vllm-sink``: every tool shows an example, fails in one line, prints JSON."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import tomllib

import vllm_sink
from vllm_sink.tools import cli

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", cli.TOOLS)
def test_help_shows_an_example(name, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main([name, "--help"])
    out = capsys.readouterr().out
    assert done.value.code == 0
    assert f"\nexample: vllm-sink {name} " in out
    assert "--json" in out


def test_help_lists_the_tools(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    for name, (_, summary) in cli.TOOLS.items():
        assert name in out and summary in " ".join(out.split())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["size", "--memory", "16"], "memory must be a number and one of MB"),
        (["size", "--block-size", "0"], "--block-size: must be a number of at least 1"),
        (["sizes"], "invalid choice: 'sizes'"),
        ([], "required: TOOL"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main([*arguments, *(["--model", "m"] if len(arguments) > 1 else [])])
    assert done.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["size", "--window-size", "0"], "sink.window_size must be an integer >= 1"),
        (["size"], "no-such-model"),
        (["analyze", "--text", "no-such-file"], "no-such-file"),
        (
            ["analyze", "--text", __file__],
            "got './no-such-model', which does not exist",
        ),
        (["heads", "--out", "h.tsv"], "got './no-such-model', which does not exist"),
        (["size", "--retrieval-heads", "no.tsv"], "'./no-such-model', which does not"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert cli.main([*arguments, "--model", "./no-such-model"]) == 1
    assert message in one_line(capsys)


def one_line(capsys) -> str:
    """The error: the last line, and the only one of ours."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if "error: " in line[:7]]
    assert len(lines) == 1 and captured.err.splitlines()[-1] == lines[0]
    return lines[0]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"model_type": "nonsense"}',
        '{"model_type": "llama", "num_key_value_heads": [2, 4]}',
        '{"model_type": "llama", "num_hidden_layers": "two"}',
        '{"model_type": "llama", "num_attention_heads": 0}',
        '{"model_type": "exaone4", "sliding_window_pattern": "LLLG"}',
        '{"model_type": "gemma3_text", "layer_types": 3}',
    ],
)
def test_any_configuration_of_a_model_is_read_or_refused_in_a_line(
    content, tmp_path, capsys
):
    (tmp_path / "config.json").write_text(content)
    assert cli.main(["size", "--model", str(tmp_path)]) == 1
    assert str(tmp_path) in one_line(capsys)


def test_a_text_that_is_none_is_named(tmp_path, capsys):
    (tmp_path / "text.bin").write_bytes(b"\xff\xfe\x00")
    text = str(tmp_path / "text.bin")
    assert cli.main(["analyze", "--model", "m", "--text", text]) == 1
    assert f"--text must be a readable text file in UTF-8, got {text!r}" in one_line(
        capsys
    )


def test_an_error_of_any_kind_is_a_line_and_tells_where_on_demand(monkeypatch, capsys):
    from vllm_sink.tools import sizing

    monkeypatch.setattr(sizing, "run", lambda args: {}["missing"])
    assert cli.main(["size", "--model", "m"]) == 1
    assert "error: m: KeyError: 'missing' (--traceback shows where)" in one_line(capsys)
    with pytest.raises(KeyError):
        cli.main(["size", "--model", "m", "--traceback"])


def test_module_is_the_command():
    """``python -m vllm_sink`` and the script are one; neither waits for vLLM."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, function = project["scripts"]["vllm-sink"].split(":")
    assert getattr(import_module(module), function) is cli.main
    assert project["version"] == vllm_sink.__version__
    code = (
        "import sys, runpy; sys.argv = ['vllm-sink', '--version']\n"
        "try: runpy.run_module('vllm_sink', run_name='__main__')\n"
        "finally: assert not {'vllm', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == f"vllm-sink {vllm_sink.__version__}\n", done.stderr
