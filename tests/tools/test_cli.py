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
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert cli.main([*arguments, "--model", "./no-such-model"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


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
