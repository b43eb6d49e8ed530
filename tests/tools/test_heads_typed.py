"""The command that ``vllm-sink heads`` prints for models with layers of other kinds."""

import itertools
import shlex

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm.engine.arg_utils import AsyncEngineArgs

from tests.helpers.engine import uncollected
from tests.zoo.models import entry_of, save
from vllm_sink.plugin.compat import parse_serve_arguments
from vllm_sink.tools import cli, serve_command

# The layers with full attention, by a model for each kind of layers beside; the last
# of Gemma 4 reads another's keys and has no heads of its own.
GOVERNED = {
    "Gemma 3": [1, 3],
    "Gemma 4, shared keys": [1],
    "Qwen3-Next": [1, 3],
    "Nemotron-H": [1],
}
STARTED = "Qwen3-Next"


def save_tokenizer(folder) -> None:
    """A token for each byte, as random models of few tokens need it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = dict(zip(letters, itertools.count(3)))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@pytest.mark.parametrize("name", GOVERNED)
def test_the_printed_command_serves_the_heads_that_were_found(
    name, tmp_path, capsys, monkeypatch
):
    """Typed as printed; the file comes to half of the governed layers' heads."""
    entry = entry_of(name)
    model, out = save(entry, tmp_path / "model"), tmp_path / "heads.tsv"
    save_tokenizer(model)
    asked = []
    real = serve_command.refusal if name == STARTED else lambda command: None
    monkeypatch.setattr(
        serve_command, "refusal", lambda command: asked.append(real(command))
    )
    arguments = ["--model", model, "--out", str(out), "--fraction", "0.5"]
    with uncollected():
        status = cli.main(["heads", *arguments, "--method", "recipe"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert asked == [None], "it would start"

    command = captured.out.partition("  vllm serve ")[2].replace("\\\n", "")
    served, *flags = shlex.split(command)
    engine_args = AsyncEngineArgs.from_cli_args(parse_serve_arguments(served, flags))
    section = engine_args.create_engine_config().additional_config["sink"]
    rows = section["retrieval_heads"]
    assert [layer for layer, row in enumerate(rows) if row] == GOVERNED[name]
    heads = [head for row in rows for head in row]
    assert 2 * sum(heads) == len(heads), "half of them"
    assert f"{sum(heads)} of them (50%)" in captured.out
    # The best by the file's own numbers.
    scores = [
        [float(score) for score in line.split()]
        for line in out.read_text().splitlines()
    ]
    assert len(scores) == len(rows), "a row for every layer"
    ranked = sorted(-score for layer in GOVERNED[name] for score in scores[layer])
    for layer in GOVERNED[name]:
        kept = [int(-score <= ranked[len(ranked) // 2 - 1]) for score in scores[layer]]
        assert kept == rows[layer]


def test_a_model_that_reads_images_is_served_without_them(monkeypatch):
    """Where the start says that it must; nothing else is added."""
    told = {
        (): "model must not look both ways; pass --language-model-only",
        ("--language-model-only",): None,
    }

    def refusal(command):
        return told[tuple(word for word in command if word == "--language-model-only")]

    monkeypatch.setattr(serve_command, "refusal", refusal)
    command = serve_command.serve_command("m", {"window_size": 60})
    first, *lines = serve_command.advice("Serve it so:", command)
    assert first == "Serve it so:"
    words = shlex.split(" ".join(lines).replace("\\", ""))
    assert words == [*command[:5], "--language-model-only", *command[5:]]
    told["--language-model-only",] = "model must be another"
    (line,) = serve_command.advice("Serve it so:", command)
    assert "vllm serve" not in line and line.endswith("model must be another")
    told[()] = "model must be another"
    (line,) = serve_command.advice("Serve it so:", command)
    assert line.endswith("model must be another")
