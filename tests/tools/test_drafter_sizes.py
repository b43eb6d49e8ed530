"""The calculator's count of a drafter; of engines: tests/engine/test_drafters*."""

import json

import pytest
import vllm.config  # noqa: F401  first: vLLM's modules import each other in a circle
from transformers import LlamaConfig, Qwen3NextConfig

from vllm_sink.policy.draft_heads import DraftHeads
from vllm_sink.tools import cli
from vllm_sink.tools.drafter import read_drafter
from vllm_sink.tools.model_layers import read_shape

LLAMA = LlamaConfig(
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    hidden_size=4096,
)
NEXT = Qwen3NextConfig(architectures=["Qwen3NextForCausalLM"])


@pytest.fixture(scope="module")
def eagle(tmp_path_factory) -> str:
    """A drafter of one layer with half as many KV heads."""
    folder = tmp_path_factory.mktemp("eagle")
    config = LlamaConfig(
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=4,
        hidden_size=2048,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    return str(folder)


def read(config, ranks=1, **settings):
    shape = read_shape(config, "bfloat16", ranks)
    settings = {"num_speculative_tokens": 2} | settings
    found = read_drafter(json.dumps(settings), config, shape, "bfloat16", ranks)
    return found, found.with_layers(found.with_states(shape))


def test_mtp_layers_are_as_the_models():
    LLAMA.num_nextn_predict_layers = 3
    drafter, shape = read(LLAMA, 2, method="mtp")
    (kind,) = shape.kinds
    assert (kind.num_layers, kind.num_kv_heads) == (32 + 3, 4)
    assert drafter.heads(shape, 2) == DraftHeads(3, 8, is_retrieval=True)


def test_a_drafters_own_heads_are_counted(eagle):
    drafter, shape = read(LLAMA, method="eagle3", model=eagle)
    assert [(x.num_layers, x.num_kv_heads) for x in shape.kinds] == [(32, 8), (1, 4)]
    assert shape.bytes_per_token == (32 * 8 + 4) * 2 * 128 * 2
    assert drafter.heads(shape, 1) == DraftHeads(1, 4, is_retrieval=False)


def test_each_drafted_token_has_a_state():
    base = read_shape(NEXT, "bfloat16", 1)
    drafter, shape = read(NEXT, method="mtp", num_speculative_tokens=2)
    full, state = shape.kinds
    assert full.num_layers == base.kinds[0].num_layers + 1
    assert state.num_states == base.kinds[1].num_states + 2
    drafter, shape = read(NEXT, method="ngram", num_speculative_tokens=4)
    assert shape.kinds[1].num_states == base.kinds[1].num_states + 4
    assert drafter.kinds == () and drafter.heads(base, 1) is None


@pytest.mark.parametrize(
    "given, message",
    [
        ("mtp", "--speculative-config must be a JSON object, got 'mtp'; write"),
        ("{}", "method must be one of custom_class, .* got None; name it"),
        ('{"method": "mtp"}', "num_speculative_tokens must be .* got None; name it"),
        (
            '{"method": "eagle", "num_speculative_tokens": 1}',
            "model must be a folder .* with eagle, got None; name it",
        ),
    ],
)
def test_what_names_no_drafter_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        read_drafter(given, LLAMA, read_shape(LLAMA), "auto", 1)


def test_command(tmp_path, eagle, capsys):
    LLAMA.architectures = ["LlamaForCausalLM"]
    LLAMA.save_pretrained(tmp_path)
    pattern = tmp_path / "heads.tsv"
    pattern.write_text(("\t".join("10101010") + "\n") * 32)
    arguments = ["size", "--model", str(tmp_path), "--retrieval-heads", str(pattern)]
    arguments += ["--max-model-len", "32768", "--json"]
    drafts = {"method": "eagle3", "model": eagle, "num_speculative_tokens": 2}
    found = []
    for more in ([], ["--speculative-config", json.dumps(drafts)]):
        assert cli.main([*arguments, *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    without, with_drafter = found
    assert without["drafter"] is None
    assert with_drafter["drafter"]["method"] == "eagle3"
    for kind in ("dense", "sink"):
        one, other = (result[kind]["decoding"]["bytes"] for result in found)
        assert other > one
    drafts["method"] = "draft_model"
    assert cli.main([*arguments, "--speculative-config", json.dumps(drafts)]) == 1
    assert "method must be one of eagle, eagle3, mtp with" in capsys.readouterr().err
