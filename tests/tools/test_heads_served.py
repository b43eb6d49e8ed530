"""End to end: heads found on one text, served, asked for needles in another."""

import pytest
from vllm import SamplingParams

from tests.helpers.engine import sink_engine
from vllm_sink.tools import cli, serve_command
from vllm_sink.tools.heads import needles, texts

SINKS, WINDOW, LENGTH = 4, 124, 400
HAYSTACKS = 2


@pytest.fixture(scope="module")
def prompts(model_path):
    """(prompt, answer) token lists; the text is none that the finder read."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    held_out = texts.read(None).held_out
    found = []
    for index in range(HAYSTACKS):
        made = needles.make(tokenizer, held_out, LENGTH, WINDOW, f"served {index}")
        for question in made.questions:
            split = len(question.tokens) - question.num_answer
            prompt = made.tokens + question.tokens[:split]
            found.append((prompt, question.tokens[split:]))
    return found


def hits(model, prompts, **settings) -> int:
    """Needles that greedy generation tells, under these ``sink`` settings or stock."""
    if settings:
        sizes = {"num_sink_tokens": SINKS, "window_size": WINDOW}
        settings = {
            "attention_backend": "sink",
            "additional_config": {"sink": {**sizes, **settings}},
        }
    params = [
        SamplingParams(temperature=0, max_tokens=len(answer)) for _, answer in prompts
    ]
    with sink_engine(model, max_model_len=512, **settings) as llm:
        requests = [{"prompt_token_ids": prompt} for prompt, _ in prompts]
        outputs = llm.generate(requests, params, use_tqdm=False)
    told = [list(output.outputs[0].token_ids) for output in outputs]
    return sum(a == b for a, (_, b) in zip(told, prompts, strict=True))


def test_a_quarter_of_the_heads_finds_what_streaming_loses(
    model_path, tmp_path, prompts, capsys, monkeypatch
):
    """The two commands of the README; 0.25 is what belongs to the file."""
    # That it starts is told by the engines below.
    monkeypatch.setattr(serve_command, "refusal", lambda command: None)
    out = tmp_path / "heads.tsv"
    text = tmp_path / "read.txt"
    text.write_text(texts.read(None).calibration)
    arguments = ["--model", model_path, "--text", str(text), "--out", str(out)]
    assert (
        cli.main(["heads", *arguments, "--fraction", "0.25", "--method", "recipe"]) == 0
    )
    assert f'"retrieval_heads": "{out}"' in capsys.readouterr().out

    full = hits(model_path, prompts)
    assert full >= 0.5 * len(prompts), "the task is one that full attention can do"
    streaming = hits(model_path, prompts, sink_positions="cache")
    assert streaming <= 0.1 * full
    # A map that the engine ignores leaves what streaming finds, or what stock does.
    quarter = hits(model_path, prompts, retrieval_heads=str(out))
    assert quarter >= 0.7 * full
