"""Pattern files of all kinds: read as their makers mean them, or refused by name."""

import gzip
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.policy.test_head_map import SCORES, SHAPE, retrieval, write_tsv
from vllm_sink.policy.config import SinkConfig
from vllm_sink.policy.head_map import select
from vllm_sink.settings.pattern_files import META_SUFFIX, digest, read_scores
from vllm_sink.settings.resolve import resolved

BEST_TWO = [[0, 1], [0, 1], [0, 0]]
BY_THRESHOLD = [[0, 1], [1, 1], [0, 0]]


def write_named(path, values, meta) -> str:
    """A pattern with what belongs to it, as ``vllm-sink heads`` names it."""
    np.savetxt(path, np.array(values), delimiter="\t")
    path.with_name(path.name + META_SUFFIX).write_text(json.dumps(meta))
    return str(path)


def test_all_formats_give_the_same_map(tmp_path):
    (tmp_path / "kvzip.json").write_text(json.dumps(SCORES))
    torch.save(torch.tensor(SCORES, dtype=torch.float16), tmp_path / "kvzip.pt")
    np.save(tmp_path / "array.npy", np.array(SCORES, dtype=np.float32))
    np.savetxt(tmp_path / "comma.csv", np.array(SCORES), delimiter=",")
    np.savetxt(tmp_path / "comma.tsv", np.array(SCORES), delimiter=",", header="a,b")
    np.savetxt(tmp_path / "packed.tsv.gz", np.array(SCORES))
    with gzip.open(tmp_path / "packed.json.gz", "wt") as file:
        json.dump(SCORES, file)
    rows = "\n".join(";".join(map(str, row)) for row in SCORES).replace(";", ",")
    (tmp_path / "bom.csv").write_text(rows, encoding="utf-8-sig")
    # Query heads, three a KV head: the best one's mean is the KV head's score.
    trials = {
        f"{i}-{3 * j + k}": [x - 0.1, x + 0.1] if k == 1 else [0.0]
        for i, layer in enumerate(SCORES)
        for j, x in enumerate(layer)
        for k in range(3)
    }
    (tmp_path / "query.json").write_text(json.dumps(trials))
    write_tsv(tmp_path, SCORES)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 10
    for source in (SCORES, *map(str, files)):
        scores = read_scores(source, SHAPE)
        assert np.allclose(scores, SCORES, atol=1e-3), source
        assert select(scores, 0.5) == select(SCORES, 0.5), source


def test_values_stay_as_they_are(tmp_path):
    """Percent in a file: ranked by its values; a threshold can't be meant."""
    percent = [[100 * x for x in layer] for layer in SCORES]
    path = write_tsv(tmp_path, percent)
    assert np.allclose(read_scores(path, SHAPE), percent)
    ranked = SinkConfig(retrieval_heads=path, retrieval_fraction=0.34)
    assert retrieval(ranked) == BEST_TWO
    for source in (path, [path]):
        with pytest.raises(ValueError, match=r"got 10.0 in .*_heads.tsv.*; pass \"ret"):
            resolved(SinkConfig(retrieval_heads=source), SHAPE)


def test_several_files_give_the_maximum(tmp_path):
    paths = []
    for index in range(2):
        scores = torch.zeros(3, 2, dtype=torch.bfloat16)
        scores[index, index] = 1
        torch.save(scores, tmp_path / f"{index}.pt")
        paths.append(str(tmp_path / f"{index}.pt"))
    assert read_scores(paths, SHAPE) == [[1, 0], [0, 1], [0, 0]]


class TestWhatBelongsToAFile:
    def test_its_own_and_nobody_elses(self, tmp_path):
        """Two files in one folder, each with a fraction; an older one's config.json."""
        write_tsv(tmp_path, SCORES, {"retrieval_fraction": 1.0})
        one = write_named(tmp_path / "a.tsv", SCORES, {"retrieval_fraction": 0.34})
        two = write_named(tmp_path / "b.tsv", SCORES, {"retrieval_fraction": 0})
        for source in (one, [one], [one, one]):
            assert retrieval(SinkConfig(retrieval_heads=source)) == BEST_TWO
        assert retrieval(SinkConfig(retrieval_heads=two)) == [[0, 0]] * 3
        asked = SinkConfig(retrieval_heads=one, retrieval_fraction=0.5)
        assert retrieval(asked) == BY_THRESHOLD
        with pytest.raises(
            ValueError, match=r"different ones, got .*0.34, .*: 0; pass"
        ):
            resolved(SinkConfig(retrieval_heads=[one, two]), SHAPE)
        both = SinkConfig(retrieval_heads=[one, two], retrieval_fraction=0.34)
        assert retrieval(both) == BEST_TWO

    def test_another_model(self, tmp_path):
        meta = {"hidden_size": 64, "model_type": "llama"}
        path = write_named(tmp_path / "a.tsv", SCORES, meta)
        assert retrieval(SinkConfig(retrieval_heads=path)) == BY_THRESHOLD
        path = write_named(tmp_path / "a.tsv", SCORES, {"hidden_size": 128})
        for source in (path, [path]):
            with pytest.raises(ValueError, match="found for a model with hidden_size="):
                resolved(SinkConfig(retrieval_heads=source), SHAPE)

    def test_content_that_was_replaced(self, tmp_path):
        content = "0.1 0.9\n0.5 0.9\n0.0 0.2\n"
        meta = {"retrieval_fraction": 0.34, "pattern_sha256": digest(content)}
        path = write_named(tmp_path / "a.tsv", SCORES, meta)
        with pytest.raises(
            ValueError, match=r"must describe the content of .*delete it"
        ):
            resolved(SinkConfig(retrieval_heads=path), SHAPE)
        (tmp_path / "a.tsv").write_text(content.replace(" ", "\t"))
        assert retrieval(SinkConfig(retrieval_heads=path)) == BEST_TWO

    def test_no_fraction(self, tmp_path):
        path = write_named(tmp_path / "a.tsv", SCORES, {"retrieval_fraction": "half"})
        with pytest.raises(ValueError, match=r"retrieval_fraction of '.*a.tsv.meta.js"):
            resolved(SinkConfig(retrieval_heads=path), SHAPE)

    def test_duo_attentions_config(self, tmp_path):
        duo = {"sink_size": 64, "recent_size": 256}
        path = write_tsv(tmp_path, SCORES, duo)
        assert retrieval(SinkConfig(retrieval_heads=path)) == BY_THRESHOLD
        path = write_tsv(tmp_path, SCORES, {**duo, "retrieval_fraction": 0.34})
        assert retrieval(SinkConfig(retrieval_heads=path)) == BEST_TWO
        path = write_tsv(tmp_path, SCORES, {**duo, "model_type": "qwen2"})
        with pytest.raises(ValueError, match="found for a model with model_type='qwen"):
            resolved(SinkConfig(retrieval_heads=path), SHAPE)

    @pytest.mark.parametrize(
        "config",
        [
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
            {"model_type": "llava", "architectures": ["Llava"], "hidden_size": 1},
            {"architectures": ["Sinks"], "sink_size": 4, "hidden_size": 1},
            {"model_type": "qwen2", "hidden_size": 1},
        ],
    )
    def test_a_models_config_is_no_patterns(self, tmp_path, config):
        path = write_tsv(tmp_path, SCORES, config)
        assert retrieval(SinkConfig(retrieval_heads=path)) == BY_THRESHOLD


def test_refused(tmp_path):
    def refused(name, content, message):
        path = tmp_path / name
        if isinstance(content, str):
            path.write_text(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(ValueError, match=message) as error:
            read_scores(str(path), SHAPE)
        assert name in str(error.value)

    refused("none.tsv", None, "readable file")
    refused(
        "a.npz", "", r"end in .csv, .json, .npy, .pt, .tsv, .txt or .gz.*write a row"
    )
    refused("heads", "", "must end in .* write a row of numbers a layer")
    refused("heads.pt.gz", "", "inside a .gz.* unpack it with gunzip")
    refused("text.tsv.gz", "1 0", "could not be read as .tsv: Not a gzipped")
    refused("text.npy", "1 0", "could not be read as .npy")
    refused("text.tsv", "layer\thead\n", "could not be read as .tsv: could not conv")
    refused("nan.tsv", "1\t0\n1\tnan\n1\t0\n", "nan at layer 1, head 1")
    refused("other.tsv", "1\t0\n" * 32, "3 layers x 2 KV heads.*32 layers")
    refused("text.pt", "no tensor", "could not be read as .pt")
    refused("dict.pt", {"a": torch.zeros(1)}, "a tensor was expected, got a dict")
    refused("deep.pt", torch.zeros(3, 2, 5), "layer 0, head 0")
    refused("flat.pt", torch.zeros(3), "got no table")
    refused("object.pt", SimpleNamespace(a=1), "could not be read as .pt")
    refused("broken.json", "{", "could not be read as .json")
    refused("number.json", "7", "got no table")
    refused("few.json", '{"0-0": [1]}', "3 layers x 6 query heads.*has 1 and not")
    keys = [f"{i}-{j}" for i in range(3) for j in range(6)]
    empty = json.dumps({key: [] for key in keys})
    refused("empty.json", empty, r"got \[\] at layer 0, head 0")
    more = json.dumps({key: [1] for key in [*keys, "3-0"]})
    refused("more.json", more, "more than those '3-0'")
