"""The sink finder on the real model, against other computations of its figures."""

import json
import math
import pydoc_data.topics

import pytest
import torch
import transformers

from tests.tools.test_headwise import build
from vllm_sink.policy.config import SinkConfig
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.tools import analyze, cli, serve_command, weak_sinks, written
from vllm_sink.tools.heads import attention

TEXT = pydoc_data.topics.topics["exceptions"] + pydoc_data.topics.topics["objects"]


@pytest.fixture(scope="module")
def loaded(model_path):
    return analyze.load(model_path)


def test_shares_equal_the_models_own_attentions(loaded, model_path, prose):
    model, _ = loaded
    tokens = torch.tensor([prose[:80], prose[300:380]])
    eager = transformers.AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        weights = torch.stack(eager(tokens, output_attentions=True).attentions)
    share = analyze.first_token_share(model, tokens)
    # weights is [L, B, H, T, T]
    torch.testing.assert_close(share, weights[:, :, :, 1:, 0].mean((1, 3)))
    late = weights[:, :, :, 40:]
    for k, value in analyze.first_tokens_share(model, tokens).items():
        assert value == pytest.approx(float(late[..., :k].sum(-1).mean()), rel=1e-4)


def test_perplexity_equals_the_reference(loaded, reference, prose):
    """An independent dense mask gives the same number."""
    model, _ = loaded
    tokens = prose[:300]
    for sinks, window in ((4, 60), (0, 64)):
        want = reference.logprobs(tokens, sinks, window, "absolute")[63:]
        got = analyze.perplexity(model, tokens, RetentionPolicy(sinks, window), 64)
        assert got == pytest.approx(math.exp(-float(want.mean())), rel=1e-3)


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Gemma3", "GptOss"])
def test_windows_of_the_models_own_stay(family):
    """A policy that hides nothing is the model's own forward."""
    model = build(family, attention.NAME)
    tokens = torch.randint(1, 96, (60,), generator=torch.Generator().manual_seed(1))
    batch, ids = tokens[None], tokens.tolist()
    with torch.inference_mode():
        want = build(family, "eager")(batch, use_cache=False).logits
        with attention.Headwise(policy=RetentionPolicy(0, 60)):
            got = model(batch, use_cache=False).logits
        full = analyze.perplexity(model, ids, None, 10)
        unlimited = analyze.perplexity(model, ids, RetentionPolicy(0, 60), 10)
        policy = analyze.perplexity(model, ids, RetentionPolicy(1, 9), 10)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
    assert unlimited == pytest.approx(full, rel=1e-4)
    assert policy != pytest.approx(full, rel=1e-3), "the policy acts on full layers"


def test_recommended_is_the_smallest_that_is_as_good():
    values = {0: 50.0, 1: 20.2, 2: 20.05, 4: 20.0, 8: 20.09}
    assert analyze.recommend(values) == 2
    assert analyze.recommend({0: 20.0, 4: 19.99}) == 0


def test_command_line(model_path, tmp_path, capsys, monkeypatch):
    """A short text: sinks are found, and the window alone is worse."""
    asked = []
    monkeypatch.setattr(serve_command, "refusal", asked.append)
    pytest.importorskip("matplotlib", reason="needs the extra: pip install -e .[eval]")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    arguments = ["--model", model_path, "--text", str(text), "--tokens", "320"]
    assert cli.main(["analyze", *arguments, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "analysis.json").read_text())
    assert asked == [analyze.command(result)]
    printed = capsys.readouterr().out
    assert set(result["sinks"]) == {"with BOS", "without BOS"}
    for sinks in result["sinks"].values():
        share = torch.tensor(sinks["share"])
        assert share.shape == (30, 9)
        assert share.min() >= 0 and share.max() <= 1
        rates = sinks["sink_rates"]
        assert rates["0.3"] > 0.5 > rates["0.8"] > 0
    perplexity = result["perplexity"]
    chosen = result["recommended_num_sink_tokens"]
    assert chosen >= 1
    assert perplexity["0"] > 1.2 * perplexity[str(chosen)]
    assert f"num_sink_tokens = {chosen} is enough" in printed
    assert (tmp_path / "first_token.png").stat().st_size > 5000
    assert "\n".join(serve_command.printed(asked[0])) in printed
    # Again is well; what somebody else put there is not overwritten.
    written.refuse_foreign(
        tmp_path / "analysis.json", [tmp_path / "first_token.png"], analyze.TOOL
    )
    (tmp_path / "analysis.json").write_text("{}")
    assert cli.main(["analyze", *arguments, "--out", str(tmp_path)]) == 1
    assert "must not overwrite what vllm-sink analyze" in capsys.readouterr().err


def test_refused(model_path, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Too short a text.")
    assert cli.main(["analyze", "--model", model_path, "--text", str(text)]) == 1
    assert "--text must hold at least 1024 tokens" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--tokens must be at least 201"):
        analyze.analyze(model_path, TEXT, 150, 200)


@pytest.mark.parametrize(
    "family, words",
    [
        ("Llama", []),
        ("Gemma2", []),
        ("GptOss", ["learned sink logits in 4 of 4 layers (no tokens"]),
        ("Qwen3Next", ["a gated attention output in 2 of 2 layers"]),
    ],
)
def test_models_that_may_need_no_sinks_are_named(family, words):
    found = weak_sinks.by_design(build(family, "eager"))
    assert len(found) == len(words)
    for sentence, word in zip(found, words, strict=True):
        assert word in sentence
    lines = weak_sinks.verdict(found, {0: 21.0, 1: 20.0, 2: 20.0, 4: 19.5})
    assert bool(lines) == bool(found)
    if found:
        assert "S = 0: 21.00, S = 1: 20.00, S = 4: 19.50" in lines[0]


def test_the_advice_comes_to_a_command():
    result = {"model": "M", "recommended_num_sink_tokens": 2}
    words = analyze.command(result)
    assert words[:5] == ["vllm", "serve", "M", "--attention-backend", "sink"]
    config = SinkConfig.from_additional_config(json.loads(words[-1]))
    assert (config.num_sink_tokens, config.window_size) == (2, SinkConfig().window_size)
