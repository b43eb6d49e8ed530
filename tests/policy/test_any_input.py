"""Any input gives a valid policy, or a ValueError of one line."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vllm_sink.policy.config import SinkConfig
from vllm_sink.policy.head_map import ModelShape
from vllm_sink.settings.pattern_files import read_scores, recommended_fraction
from vllm_sink.settings.resolve import resolved
from vllm_sink.tools import sizing

SHAPE = ModelShape(3, 2, 6, (), "tiny")
KINDS = (".tsv", ".txt", ".csv", ".npy", ".pt", ".json", ".tsv.gz")
many = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, 4, 2**31]))
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner)
    ),
    max_leaves=12,
)
keys = st.one_of(
    st.sampled_from([field for field in SinkConfig.__dataclass_fields__]),
    st.text(max_size=8),
)
# Mostly of the right form: what is wrong is one entry.
table = st.lists(st.lists(st.one_of(numbers, json_values), min_size=2, max_size=2))
per_query_head = st.fixed_dictionaries(
    {
        f"{layer}-{head}": st.one_of(json_values, st.lists(numbers, max_size=2))
        for layer in range(SHAPE.num_layers)
        for head in range(SHAPE.num_heads)
    }
)


def one_line(error: pytest.ExceptionInfo | Exception) -> None:
    text = str(error)
    assert text and len(text.splitlines()) == 1, text


@many
@given(st.one_of(json_values, st.dictionaries(keys, st.one_of(json_values, table))))
@example({"window_size\n": 4})
@example({"retrieval_heads": [[10**400, 0]] * 3})
def test_sections(section):
    try:
        config = SinkConfig.from_additional_config({"sink": section})
        chosen = resolved(config, SHAPE)
    except ValueError as error:
        one_line(error)
        return
    assert chosen.policy.num_sink_tokens >= 0 and chosen.policy.window_size >= 1
    for limit in (1, 100, 2**40):
        clipped = chosen.clipped(limit)
        assert clipped.window_size <= limit and clipped.num_sink_tokens <= limit
    if chosen.has_retrieval:
        assert chosen.head_map.num_layers == SHAPE.num_layers


def read(path) -> None:
    try:
        scores = read_scores(str(path), SHAPE)
        recommended_fraction(str(path))
    except ValueError as error:
        one_line(error)
    else:
        assert [len(layer) for layer in scores] == [2, 2, 2]


@pytest.mark.parametrize("kind", KINDS)
@many
@given(data=st.binary(max_size=200))
@example(data=b"[" * 100_000)
@example(data=b"1 " * 6)
def test_pattern_files_of_any_bytes(kind, data, tmp_path):
    path = tmp_path / f"heads{kind}"
    path.write_bytes(data)
    read(path)


@many
@given(st.one_of(table, per_query_head, json_values))
@example([[10**400, 0]] * 3)
@example({f"{layer}-{head}": "a" for layer in range(3) for head in range(6)})
@example({f"{layer}-{head}": [[]] for layer in range(3) for head in range(6)})
def test_pattern_files_of_any_json(tmp_path, values):
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(values))
    read(path)


@many
@given(data=st.one_of(st.binary(max_size=40), json_values))
@example(data=b"[" * 100_000)
@example(data={"sink_size": 4, "retrieval_fraction": "half"})
@pytest.mark.parametrize("name", ["config.json", "heads.tsv.meta.json"])
def test_any_config_beside_a_pattern(tmp_path, name, data):
    path = tmp_path / "heads.tsv"
    path.write_text("0 1\n" * 3)
    beside = tmp_path / name
    if isinstance(data, bytes):
        beside.write_bytes(data)
    else:
        beside.write_text(json.dumps(data))
    read(path)


def test_a_folder_with_an_odd_name(tmp_path):
    folder = tmp_path / "of\ntwo lines"
    folder.mkdir()
    for kind in KINDS:
        (folder / f"heads{kind}").write_text("1")
        read(folder / f"heads{kind}")
    (folder / "config.json").write_text("{")
    (folder / "heads.tsv").write_text("0 1\n" * 3)
    read(folder / "heads.tsv")


def test_no_file_is_unpickled(tmp_path):
    """A ``.pt`` that would run code on reading is refused, and its code not run."""
    import torch

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save(Payload(), tmp_path / "heads.pt")
    with pytest.raises(ValueError, match=r"could not be read as \.pt"):
        read_scores(str(tmp_path / "heads.pt"), SHAPE)
    assert not (tmp_path / "ran").exists()


@many
@given(st.text(max_size=12))
def test_memory_sizes(text):
    try:
        assert sizing.parse_memory(text) >= 0
    except Exception as error:
        assert type(error).__name__ == "ArgumentTypeError"
        one_line(error)


@many
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "hidden_size",
                "sliding_window",
                "layer_types",
                "num_kv_shared_layers",
                "dtype",
                "kv_lora_rank",
            ]
        ),
        st.one_of(json_values, st.integers(0, 64), st.lists(st.just("full_attention"))),
    )
)
@example({"num_hidden_layers": 2**31})  # a list of that length takes 16 GiB
def test_any_model_configuration(values):
    """The calculator counts it or says in one line why not."""
    plain = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 64,
        "dtype": "float32",
    }
    text = SimpleNamespace(**(plain | values))
    config = SimpleNamespace(get_text_config=lambda decoder: text)
    try:
        shape = sizing.read_shape(config)
    except ValueError as error:
        one_line(error)
    else:
        assert shape.num_full_layers + shape.num_sliding_layers >= 1
        assert shape.bytes_per_token > 0
