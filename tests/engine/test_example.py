"""The example at the root runs as it is, under the policy that it names."""

import contextlib
import shutil
from pathlib import Path

import example
from tests.helpers.engine import manager, sink_engine
from tests.helpers.random_llama import save_llama
from vllm_sink.policy.layout import RetentionPolicy


def test_example(model_path, tmp_path, monkeypatch, capsys):
    """Each prompt is answered past the budget; the words are a random model's."""
    save_llama(tmp_path, vocab_size=49152)  # of the tokenizer that it borrows
    for file in Path(model_path).glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    policies = []

    with contextlib.ExitStack() as engines:

        def start(model: str, **settings):
            llm = engines.enter_context(
                sink_engine(model, max_model_len=1024, **settings)
            )
            policies.append(manager(llm).policy)
            return llm

        monkeypatch.setattr(example, "LLM", start)
        example.main(str(tmp_path))
    assert policies == [RetentionPolicy(4, 124)]
    shown = capsys.readouterr().out
    assert shown.count("(160 tokens)") == len(example.PROMPTS) == 2
    assert all(repr(prompt) in shown for prompt in example.PROMPTS)
