"""The README's length, and its matrix against checks and tests."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.refusals import drafter, stub_engine
from vllm_sink.attention.backend import SinkBackend
from vllm_sink.start.checks import check_settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
LINK = re.compile(r'\[(works|refused)\]\((\S+) "([^)]+)"\)')
PLAIN, HEADS = "every head alike", "with retrieval heads"


def read_matrix() -> dict[str, dict[str, str]]:
    """Row -> column -> cell."""
    section = README.split("## Features\n")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    assert rows[0] == ["", PLAIN, HEADS]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


MATRIX = read_matrix()
CELLS = [(row, column) for row in MATRIX for column in (PLAIN, HEADS)]


def refused_messages() -> list[str]:
    """The messages that docs/refusals.md knows."""
    text = (ROOT / "docs" / "refusals.md").read_text()
    return re.findall(r"`([^`]+)`", " ".join(re.findall(r"(?m)^\|([^|]+)\|", text)))


@pytest.mark.parametrize("row, column", CELLS)
def test_a_cell_links_a_test_or_a_refusal_that_exists(row, column):
    cell = MATRIX[row][column]
    link = LINK.match(cell)
    if link is None:
        assert cell.startswith("not tried"), cell
        return
    verdict, target, title = link.groups()
    if verdict == "works":
        assert re.search(rf"(?m)^ *(async )?def {title}\(", (ROOT / target).read_text())
    else:
        assert target == "docs/refusals.md"
        assert any(title in message for message in refused_messages()), title


def parallel(**sizes: int) -> dict[str, Any]:
    return {f"parallel_config__{name}": value for name, value in sizes.items()}


# What asks for the feature, where the settings tell of it.
ASKED: dict[str, list[dict[str, Any]]] = {
    "tensor parallel": [parallel(tensor_parallel_size=2)],
    "pipeline parallel": [parallel(pipeline_parallel_size=2)],
    "data parallel": [parallel(data_parallel_size=2)],
    "context parallel": [
        parallel(decode_context_parallel_size=2),
        parallel(prefill_context_parallel_size=2),
    ],
    "drafts: n-gram": [{"speculative_config": drafter("ngram")}],
    "drafts: a model": [{"speculative_config": drafter("draft_model")}],
    "drafts: EAGLE, MTP": [
        {"speculative_config": drafter(method)} for method in ("eagle", "eagle3", "mtp")
    ],
    "drafts: DFlash, DSpark": [
        {"speculative_config": drafter(method)} for method in ("dflash", "dspark")
    ],
    "images, seen both ways": [{"model_config__is_mm_prefix_lm": True}],
    "KV connectors": [
        {"kv_transfer_config": SimpleNamespace(kv_connector=name)}
        for name in ("LMCacheConnectorV1", "NixlConnector", "OffloadingConnector")
    ],
}
WITH_HEADS = {
    "additional_config": {"sink": {"retrieval_heads": [[1, 0], [0, 0]]}},
    "cache_config__kv_sharing_fast_prefill": False,
    "model_config__hf_text_config": SimpleNamespace(num_attention_heads=4),
    "model_config__get_total_num_hidden_layers": lambda: 2,
    "model_config__get_total_num_kv_heads": lambda: 2,
    "model_config__get_sliding_window": lambda: None,
    "model_config__max_model_len": 8192,
}


@pytest.mark.parametrize("row, column", [cell for cell in CELLS if cell[0] in ASKED])
def test_the_checks_refuse_what_the_matrix_says(row, column):
    heads = WITH_HEADS if column == HEADS else {}
    check_settings(stub_engine(**heads))
    link = LINK.match(MATRIX[row][column])
    for changes in ASKED[row]:
        engine = stub_engine(**changes, **heads)
        if link is None or link[1] == "works":
            check_settings(engine)
            continue
        with pytest.raises(ValueError) as error:
            check_settings(engine)
        said = link[3].replace("decode_", "")  # of both context parallels
        assert said.split(" with ")[0] in str(error.value)


def test_an_fp8_cache_is_refused_on_a_cpu():
    for cell in MATRIX["fp8 KV cache, CPU"].values():
        assert cell.startswith("[refused]")
    for cell in MATRIX["fp8 KV cache, GPU"].values():
        assert cell.startswith("[works]")
    selector = SimpleNamespace(
        use_mla=False,
        use_sparse=False,
        attn_type="decoder",
        kv_cache_dtype="fp8",
        block_size=128,
        use_non_causal=False,
        use_mm_prefix=False,
    )
    with pytest.raises(ValueError, match="--kv-cache-dtype must be"):
        SinkBackend.refuse_unsupported(selector)


def test_every_feature_has_its_row():
    wanted = (
        "prefix cache, chunked prefill, preemption, tensor parallel, "
        "pipeline parallel, data parallel, Ray, drafts, fp8 KV cache, LoRA, "
        "multimodal, quantized weights, streaming sessions, KV connectors"
    )
    missing = [
        name
        for name in wanted.split(", ")
        if not any(row.startswith(name) for row in MATRIX)
    ]
    assert not missing and set(ASKED) <= set(MATRIX)


def test_it_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 120
    first_screen = "\n".join(README.splitlines()[:20])
    assert "bash scripts/demo.sh" in first_screen
    assert "bash scripts/test.sh" in first_screen
    for target in re.findall(r"\]\(([^)#\s]+)", README):
        assert (ROOT / target).exists(), target
