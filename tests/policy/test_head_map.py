"""Scores become one head map, by value, or are refused by name."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from vllm_sink.policy.config import SinkConfig
from vllm_sink.policy.head_map import (
    HeadMap,
    ModelShape,
    heads_of_rank,
    select,
)
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.settings.layer_kinds import layer_owners
from vllm_sink.settings.resolve import resolve, resolved

SHAPE = ModelShape(3, 2, 6, (("model_type", "llama"), ("hidden_size", 64)), "tiny")
SCORES = [[0.1, 0.9], [0.5, 0.9], [0.0, 0.2]]


def write_tsv(folder, values, config=None) -> str:
    """A pattern as DuoAttention saves it."""
    path = folder / "full_attention_heads.tsv"
    np.savetxt(path, np.array(values), delimiter="\t")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return str(path)


def retrieval(config: SinkConfig) -> list[list[int]]:
    return resolved(config, SHAPE).head_map.values()


class TestSelect:
    def test_threshold(self):
        assert select(SCORES).values() == [[0, 1], [1, 1], [0, 0]]

    @pytest.mark.parametrize(
        "fraction, count", [(0, 0), (0.25, 2), (0.5, 3), (0.75, 5), (1, 6)]
    )
    def test_fraction_is_rounded_halves_up(self, fraction, count):
        assert select(SCORES, fraction).num_retrieval_heads == count

    def test_ties_go_to_the_lower_layer_then_head(self):
        ties = [[0.7, 0.7], [1.0, 0.7], [0.7, 0.7]]
        assert select(ties, 0.5).values() == [[1, 1], [1, 0], [0, 0]]

    def test_layers_come_whatever_the_scores(self):
        assert select(SCORES, 0.17, [2]).values() == [[0, 1], [0, 0], [1, 1]]

    def test_kinds(self):
        assert select(SCORES).splits_layers
        assert not select(SCORES, 0, [1]).splits_layers
        assert select(SCORES, 1).is_uniform and select(SCORES, 0).is_uniform
        assert not select(SCORES, 0.5).is_uniform

    def test_ranks(self):
        heads = HeadMap(((True, False, False, True), (True, True, False, False)))
        assert heads_of_rank(1, 2, 4) == range(2, 4)
        assert [heads.count(heads_of_rank(r, 2, 4)) for r in range(2)] == [3, 1]
        # more ranks than heads: a head is on several
        assert [heads_of_rank(r, 8, 4)[0] for r in range(8)] == [
            *(0, 0, 1, 1),
            *(2, 2, 3, 3),
        ]


class TestResolve:
    def test_values_replace_the_path_and_nothing_else(self, tmp_path):
        path = write_tsv(tmp_path, SCORES)
        section = {
            "num_sink_tokens": 2,
            "retrieval_heads": path,
            "retrieval_fraction": 0.34,
            "retrieval_layers": [2],
            "retrieval_window_size": 100,
        }
        given = {"sink": section, "other": 1}
        engine = vllm_config(given)
        config = resolve(engine)
        assert given["sink"] is section and section["retrieval_heads"] == path
        assert engine.additional_config == {
            "sink": {
                "num_sink_tokens": 2,
                "retrieval_heads": [[0, 1], [0, 1], [1, 1]],
                "retrieval_window_size": 100,
            },
            "other": 1,
        }
        assert json.dumps(engine.additional_config)  # part of a cache key of vLLM's
        (tmp_path / "full_attention_heads.tsv").unlink()  # no one reads it again
        before = engine.additional_config
        assert resolve(engine) == config
        assert engine.additional_config is before

    def test_without_heads_nothing_changes(self):
        engine = vllm_config({"sink": {"num_sink_tokens": 2}})
        before = engine.additional_config
        assert resolve(engine) == SinkConfig(num_sink_tokens=2)
        assert engine.additional_config is before
        assert SinkConfig().head_map is None


def vllm_config(additional_config):
    text = SimpleNamespace(num_attention_heads=6, model_type="llama", hidden_size=64)
    model = SimpleNamespace(
        hf_text_config=text,
        model="tiny",
        get_total_num_hidden_layers=lambda: 3,
        get_total_num_kv_heads=lambda: 2,
    )
    return SimpleNamespace(additional_config=additional_config, model_config=model)


def test_the_smallest_and_the_largest_values_are_taken():
    config = SinkConfig(0, 1, retrieval_layers=[0], retrieval_window_size=1)
    assert retrieval(config) == [[1, 1], [0, 0], [0, 0]]
    for fraction in (0, 1):
        chosen = SinkConfig(retrieval_heads=SCORES, retrieval_fraction=fraction)
        assert retrieval(chosen) == [[fraction] * 2] * 3


@pytest.mark.parametrize(
    "window, own, length, is_one",
    [
        (4092, 4092, 65536, True),
        (4092, 16384, 2048, True),
        (16384, 4092, 2048, True),
        (4092, 16384, 4093, False),
        (4092, 4091, 65536, False),
        (4092, None, 2048, False),  # two kinds of specs, though both keep everything
    ],
)
def test_equal_policies_are_one(window, own, length, is_one):
    config = SinkConfig(
        4, window, retrieval_heads=[[1, 0]], retrieval_window_size=own
    ).clipped(length)
    assert (config.head_map is None) == is_one
    if is_one:
        assert config == SinkConfig(4, min(window, length))


def test_a_fraction_ranks_scores_of_any_scale():
    """Percent, logits: values clipped to 1 would tie, and layers decide."""
    for scale, shift in ((100, 0), (1, -7), (1000, 50)):
        scores = [[scale * x + shift for x in layer] for layer in SCORES]
        config = SinkConfig(retrieval_heads=scores, retrieval_fraction=0.34)
        assert retrieval(config) == [[0, 1], [0, 1], [0, 0]]


def test_a_trained_score_may_overshoot():
    config = SinkConfig(retrieval_heads=[[1.06, -0.03], [0.49, 0.5], [1, 0]])
    assert retrieval(config) == [[1, 0], [0, 1], [1, 0]]


def test_a_window_of_their_own_keeps_the_sinks_and_is_clipped():
    config = SinkConfig(4, 252, retrieval_layers=[0], retrieval_window_size=4092)
    assert config.retrieval_policy == RetentionPolicy(4, 4092)
    clipped = config.clipped(1000)
    assert clipped.policy == RetentionPolicy(4, 252)
    assert clipped.retrieval_policy == RetentionPolicy(4, 1000)


class TestRefusals:
    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"retrieval_heads": 3}, "retrieval_heads must be .*got 3; "),
            ({"retrieval_heads": []}, r"retrieval_heads must be .*got \[\]"),
            ({"retrieval_heads": [[1, 0]] * 4}, "3 layers x 2 KV .*4 layers x 2 heads"),
            ({"retrieval_heads": [[1]] * 3}, "3 layers x 2 KV heads.*3 layers x 1"),
            ({"retrieval_heads": [[1, 0], [1], [1, 0]]}, "3 layers x 1 or 2 heads"),
            ({"retrieval_heads": [[1, "x"], [1, 0], [1, 0]]}, "'x' at layer 0, head 1"),
            ({"retrieval_heads": [[1, 0], [1, math.nan], [1, 0]]}, "layer 1, head 1"),
            ({"retrieval_heads": [[1, 0], [1, math.inf], [1, 0]]}, "got inf at layer"),
            ({"retrieval_heads": SCORES, "retrieval_fraction": 1.5}, "0 to 1, got 1.5"),
            ({"retrieval_heads": SCORES, "retrieval_fraction": True}, "got True"),
            ({"retrieval_heads": SCORES, "retrieval_fraction": math.nan}, "got nan"),
            (
                {"retrieval_heads": [[84.4, 0], [1, 0], [1, 0]]},
                r'from 0 to 1 where no fraction is given, got 84.4; pass "retrieval_fr',
            ),
            ({"retrieval_heads": [[-3.5, 0], [1, 0], [1, 0]]}, "got -3.5; pass"),
            ({"retrieval_fraction": 0.5}, "left out without sink.retrieval_heads"),
            ({"retrieval_window_size": 9}, "without .*heads or sink.retrieval_layers"),
            (
                {"retrieval_layers": [1], "retrieval_window_size": 0},
                "retrieval_window_size must be an integer >= 1, got 0",
            ),
            ({"num_sink_tokens": -1}, "num_sink_tokens must be .* >= 0, got -1"),
            ({"window_size": 0}, "window_size must be .* >= 1, got 0"),
            ({"retrieval_layers": [3]}, "retrieval_layers must be below 3.*got 3"),
            ({"retrieval_layers": [-1]}, "retrieval_layers must be .*got .-1"),
            ({"retrieval_layers": 1}, "retrieval_layers must be a list .*got 1"),
        ],
    )
    def test_values(self, settings, message):
        with pytest.raises(ValueError, match=message):
            resolved(SinkConfig(**settings), SHAPE)


# Layers 0 and 3 have windows of their own, layer 4 reads the keys of layer 2.
BESIDE = ModelShape(5, 2, 4, name="hybrid", owners=(None, 1, 2, None, 2))


class TestLayersBeside:
    """Layers that the policy doesn't govern have no rows and count in no fraction."""

    def chosen(self, rows, fraction=None, layers=None):
        config = SinkConfig(
            retrieval_heads=rows, retrieval_fraction=fraction, retrieval_layers=layers
        )
        first = resolved(config, BESIDE)
        assert resolved(first, BESIDE) == first, "resolving again changes nothing"
        return first.head_map

    def test_rows_of_other_layers_are_ignored(self):
        rows = [[9, 9], [0.1, 0.9], [0.4, 0.2], [9, 9, 9], [0.3, 0.8]]
        heads = self.chosen(rows, 0.5)
        assert heads.values() == [[], [0, 1], [0, 1], [], []]
        assert (heads.num_heads, heads.num_governed_layers) == (4, 2)
        assert (heads.num_layers, heads.num_kv_heads) == (5, 2)
        assert heads.count([1]) == 2 and heads.splits_layers and not heads.is_uniform

    def test_a_reader_counts_for_the_layer_that_it_reads(self):
        rows = [[0, 0], [0, 0], [0, 1], [0, 0], [1, 0]]
        assert self.chosen(rows).values()[2] == [1, 1]

    def test_rows_of_the_governed_layers_alone(self):
        assert self.chosen([[1, 0], [0, 1], [0, 0]]).values()[1:3] == [[1, 0], [0, 1]]
        assert self.chosen([[1, 0], [0, 1]]).values()[1:3] == [[1, 0], [0, 1]]
        with pytest.raises(ValueError, match=r"5 layers \(or the 2 with .* got 4"):
            self.chosen([[1, 0]] * 4)

    def test_layers_by_name(self):
        config = SinkConfig(retrieval_layers=[4])
        assert resolved(config, BESIDE).head_map.values() == [
            [],
            [0, 0],
            [1, 1],
            [],
            [],
        ]
        with pytest.raises(ValueError, match="of which hybrid has 1, 2, 4, got 3"):
            resolved(SinkConfig(retrieval_layers=[3]), BESIDE)
        nothing = ModelShape(2, 2, 4, name="windows", owners=(None, None))
        with pytest.raises(ValueError, match="without a layer of full att"):
            resolved(SinkConfig(retrieval_layers=[0]), nothing)

    def test_query_heads_of_the_governed_layers(self, tmp_path):
        path = tmp_path / "heads.json"
        trials = {
            f"{i}-{head}": [i / 10 + head] for i in (1, 2, 4) for head in range(4)
        }
        path.write_text(json.dumps(trials))
        heads = self.chosen(str(path), 0.5)
        assert heads.values() == [[], [0, 1], [0, 1], [], []]


@pytest.mark.parametrize(
    "config, owners",
    [
        ({}, ()),
        ({"layer_types": ["full_attention"] * 4}, ()),
        ({"layers_block_type": ["hybrid"] * 4}, ()),
        (
            {"layer_types": ["linear_attention", "full_attention"] * 2},
            (None, 1, None, 3),
        ),
        ({"hybrid_override_pattern": "M*-*"}, (None, 1, None, 3)),
        ({"attn_type_list": [0, 1, 0, 1]}, (None, 1, None, 3)),
        ({"hybrid_layer_pattern": [0, 1, 1, 0]}, (0, None, None, 3)),
        (
            {
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "num_kv_shared_layers": 2,
            },
            (None, 1, None, 1),
        ),
        (  # the last layer that has keys of its own, of several
            {"layer_types": ["full_attention"] * 4, "num_kv_shared_layers": 1},
            (0, 1, 2, 2),
        ),
    ],
)
def test_the_governed_layers_of_a_configuration(config, owners):
    assert layer_owners(SimpleNamespace(**config), 4) == owners
