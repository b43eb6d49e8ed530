"""``vllm-sink check`` reports as a start does: same words, same numbers."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV2Config,
    FalconH1Config,
    Gemma3Config,
    LlamaConfig,
    WhisperConfig,
)
from vllm.engine.arg_utils import AsyncEngineArgs

from tests.helpers import refusals
from tests.helpers.engine import uncollected
from tests.helpers.random_llama import save_big_code, save_llama
from vllm_sink.plugin.compat import parse_serve_arguments
from vllm_sink.start import log_lines
from vllm_sink.start.checks import check_settings
from vllm_sink.tools import check, cli

TABLE = Path(__file__).parents[2] / "docs" / "refusals.md"
SINK = ["--attention-backend", "sink"]


HOST_CACHE = [
    "--kv-transfer-config",
    json.dumps(
        {
            "kv_connector": "SinkHostCache",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"host_cache_gib": 0.1},
        }
    ),
]


def section(**keys) -> list[str]:
    return [*SINK, "--additional-config", json.dumps({"sink": keys})]


# What starts a row of the table -> (model, flags) that the start refuses with it.
CASES = {
    "sink.num_sink_tokens must be": ("llama", section(num_sink_tokens=-1)),
    "sink.window_size must be": ("llama", section(window_size=0)),
    "must be one of num_sink_tokens": ("llama", section(windowsize=60)),
    "sink.sink_positions must be": ("llama", section(sink_positions="rel")),
    "additional_config.sink must be": (
        "llama",
        [*SINK, "--additional-config", '{"sink": [4, 60]}'],
    ),
    "max_model_len must be <=": (
        "llama",
        [*section(window_size=60), "--max-model-len", "2048"],
    ),
    "--hf-overrides must rotate": (
        "llama",
        [
            *section(window_size=60),
            "--hf-overrides",
            '{"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, '
            '"factor": 2.0}}',
        ],
    ),
    "decode_context_parallel_size must be": (
        "llama",
        [
            *SINK,
            *("-tp", "2", "--decode-context-parallel-size", "2"),
            # vLLM's own condition for it.
            *("--hf-overrides", '{"num_key_value_heads": 1}'),
        ],
    ),
    "prefill_context_parallel_size must be": (
        "llama",
        [*SINK, "--prefill-context-parallel-size", "2"],
    ),
    "kv_connector must be": (
        "llama",
        [
            *SINK,
            "--kv-transfer-config",
            '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}',
        ],
    ),
    "kv_connector must be unset for a model": (
        "falcon h1",
        [*section(retrieval_heads=[[1, 0], [0, 0]]), *HOST_CACHE],
    ),
    "--attention-backend must be sink where": (
        "llama",
        ["--additional-config", '{"sink": {"window_size": 60}}'],
    ),
    "sink_positions must be 'absolute'": ("hunyuan", section(window_size=60)),
    "sink.retrieval_heads must": ("llama", section(retrieval_heads="none.tsv")),
    "sink.retrieval_fraction must": ("llama", section(retrieval_fraction=0.5)),
    "sink.retrieval_layers must": ("llama", section(retrieval_layers=[3])),
    "sink.retrieval_window_size must": ("llama", section(retrieval_window_size=9)),
    "must be false with sink.retrieval_heads": (
        "llama",
        [*section(retrieval_layers=[0]), "--kv-sharing-fast-prefill"],
    ),
    "speculative_config.method must be one of": (
        "llama",
        [
            *section(retrieval_layers=[0]),
            "--speculative-config",
            '{"method": "draft_model", "model": "MODEL", "num_speculative_tokens": 2}',
        ],
    ),
    "sink.retrieval_heads must be left out": (
        "llama",
        [
            *section(retrieval_layers=[0]),
            "--hf-overrides",
            json.dumps({"layer_types": ["sliding_attention"] * 3, "sliding_window": 8}),
        ],
    ),
    "model must not use MLA": ("deepseek", SINK),
    "model must be decoder-only": ("whisper", SINK),
    "model must not use ALiBi": ("bloom", SINK),
    "--attention-backend sink must be left out": (
        "llama",
        [*SINK, "--block-size", "8"],
    ),
    "--kv-cache-dtype must be": ("llama", [*SINK, "--kv-cache-dtype", "fp8"]),
    "num_attention_heads and num_key_value_heads must": (
        "big code",
        [
            *section(sink_positions="absolute"),
            *("--hf-overrides", '{"num_key_value_heads": 4}'),
        ],
    ),
}


@pytest.fixture(autouse=True)
def _quick_starts():
    with uncollected():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Folders by name; those refused before weights are read hold no weights."""
    folder = tmp_path_factory.mktemp("models")
    tiny = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
    configs = {
        "deepseek": DeepseekV2Config(**tiny, architectures=["DeepseekV2ForCausalLM"]),
        "bloom": BloomConfig(
            hidden_size=64, n_layer=2, n_head=4, architectures=["BloomForCausalLM"]
        ),
        "falcon h1": FalconH1Config(
            **tiny,
            num_attention_heads=4,
            num_key_value_heads=2,
            mamba_d_ssm=64,
            mamba_n_heads=4,
            mamba_d_state=16,
            architectures=["FalconH1ForCausalLM"],
        ),
        "whisper": WhisperConfig(
            d_model=64, architectures=["WhisperForConditionalGeneration"]
        ),
    }
    for name, config in configs.items():
        config.save_pretrained(folder / name)
    save_llama(folder / "llama")
    save_hunyuan(folder / "hunyuan")
    save_big_code(folder / "big code")
    saved = ("llama", "hunyuan", "big code")
    return {name: str(folder / name) for name in (*configs, *saved)}


def save_hunyuan(folder: Path) -> None:
    """Keys scaled by a weight after the rotation: no table explains them."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING["hunyuan_v1_dense"](
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    model.float().save_pretrained(folder)


def start(model: str, flags: list[str]) -> str | None:
    """What ``vllm serve`` comes to: the error's words, None if it starts."""
    args = AsyncEngineArgs.from_cli_args(parse_serve_arguments(model, flags))
    args.skip_tokenizer_init = args.enforce_eager = True
    try:
        with check.started(args):
            return None
    except Exception as error:
        return check.message(error)


def refusal(case: refusals.Case) -> str:
    """What the configuration of a case is refused with."""
    with pytest.raises(ValueError) as caught:
        check_settings(refusals.stub_engine(**case.changes))
    return str(caught.value)


def rows() -> list[str]:
    """Every message in the first cells of the table of refusals."""
    table = TABLE.read_text().split("Elsewhere:")[0]
    cells = re.findall(r"^\| (`[^|]+`) \|", table, re.MULTILINE)
    return [text for cell in cells for text in re.findall("`([^`]+)`", cell)]


@pytest.mark.parametrize("row", rows())
def test_check_agrees_with_the_start(row, models, monkeypatch):
    found = [prefix for prefix in CASES if row.startswith(prefix)]
    if not found:  # a model or drafter too rare to build: its check alone
        texts = [refusal(case) for case in refusals.CASES]
        assert any(row in text for text in texts), f"no case for {row!r}"
        return
    name, flags = CASES[max(found, key=len)]
    flags = [flag.replace("MODEL", models[name]) for flag in flags]
    # Else vLLM itself refuses a length beyond the trained one, by its own words.
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    report = check.check(models[name], flags)
    assert not report["starts"]
    assert row in report["refusal"]
    told = start(models[name], flags)
    if "rotation" in row:  # what was measured comes with other weights
        report["refusal"], told = (
            text.partition(" (")[0] for text in (report["refusal"], told)
        )
    assert report["refusal"] == told


def test_states_start_without_host_memory(models):
    """What the refusal says to do, with heads of two kinds beside them."""
    name, flags = CASES["kv_connector must be unset for a model"]
    assert flags[-2:] == HOST_CACHE
    report = check.check(models[name], flags[:-2])
    assert report["starts"], report["refusal"]


def test_every_case_is_a_row():
    for prefix in CASES:
        assert any(row.startswith(prefix) for row in rows()), prefix


def test_a_good_policy_needs_no_weights(models, tmp_path, monkeypatch):
    """The report is the start's: same words of the same block manager."""
    lines = []
    monkeypatch.setattr(
        log_lines.logger, "info", lambda text, *values: lines.append(text % values)
    )
    flags = section(num_sink_tokens=2, window_size=62)
    assert start(models["llama"], flags) is None
    shutil.copy(Path(models["llama"]) / "config.json", tmp_path)
    report = check.check(str(tmp_path), flags)
    assert report["starts"] and report["refusal"] is None
    lines = [line for line in lines if line.startswith("Sink policy")]
    assert len(lines) == 2 and report["start_lines"] == lines[:1] == lines[1:]
    assert (report["num_sink_tokens"], report["window_size"]) == (2, 62)
    assert report["attention_layers"] == report["turned_layers"] == 3
    assert "starts" in check.words(report)
    flags = section(sink_positions="absolute", num_sink_tokens=2, window_size=62)
    report = check.check(str(tmp_path), [*flags, *HOST_CACHE])
    assert report["turned_layers"] == 0
    policy, host = report["start_lines"]
    assert policy in lines
    assert re.fullmatch(
        r"Host cache: [\d,]+ blocks \(.*\) keep about .* of any .*", host
    )


@pytest.mark.usefixtures("importable_multimodal_models")
@pytest.mark.parametrize("flags", [[], ["--language-model-only"]])
def test_a_processor_of_images_gets_its_tokenizer(tmp_path, monkeypatch, flags):
    """vLLM refuses to build it without."""
    config = Gemma3Config(
        text_config={"hidden_size": 64, "num_hidden_layers": 2},
        architectures=["Gemma3ForConditionalGeneration"],
    )
    config.save_pretrained(tmp_path)
    asked = []

    def started(engine_args):
        asked.append(engine_args.skip_tokenizer_init)
        raise ValueError("enough")

    monkeypatch.setattr(check, "started", started)
    assert check.check(str(tmp_path), flags)["refusal"] == "enough"
    assert asked == [bool(flags)]


def test_command(tmp_path, capsys):
    """Standard output is the report's alone, and the status says if it starts."""
    LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=512,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    command = [sys.executable, "-m", "vllm_sink", "check", str(tmp_path)]
    done = subprocess.run([*command, *SINK, "--json"], capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert (done.returncode, report["starts"]) == (0, True), done.stderr[-2000:]
    assert report["max_model_len"] == 2048
    assert "full attention, because max_model_len 2,048" in report["start_lines"][0]
    assert cli.main(["check", str(tmp_path), *section(window_size=0)]) == 1
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .startswith(
            "would not start: sink.window_size must be an integer >= 1, got 0; give"
        )
    )
