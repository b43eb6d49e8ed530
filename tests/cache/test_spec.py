"""A layer's spec, as vLLM reads it."""

from dataclasses import replace

from tests.helpers.block_managers import full_spec, sink_spec
from vllm_sink.cache.spec import SinkSpec
from vllm_sink.policy.config import SinkConfig
from vllm_sink.policy.layout import RetentionPolicy

SPEC = sink_spec(RetentionPolicy(4, 20), 16)


def test_runner_v2_nulls_no_entry_of_the_block_table():
    """vLLM 0.33's V2 nulls entries below the window unless this is 0: the sinks'."""
    assert SPEC.num_retained_tokens == 0


def test_tokens_that_vllm_asks_to_retain_widen_the_window():
    assert replace(SPEC, extra_retained_tokens=3).policy == RetentionPolicy(4, 23)


def test_admission_counts_the_tokens_in_flight():
    """A block of sinks, ceil((19 + 48) / 16) of the window, one at its edge."""
    assert SPEC.max_admission_blocks_per_request(48, 1000) == 1 + 5 + 1
    assert SPEC.max_admission_blocks_per_request(48, 64) == 4


def test_merged_specs_count_their_layers():
    pair = SinkSpec.merge([SPEC, SPEC])
    assert pair.num_layers == 2
    assert SinkSpec.merge([pair, SPEC]).num_layers == 3


def test_one_group_has_one_policy():
    same = {"a": SPEC, "b": replace(SPEC, num_layers=2)}
    assert SPEC.is_uniform_with_collection(same)
    for change in (
        {"num_sink_tokens": 5},
        {"sliding_window": 21},
        {"is_retrieval": True},
    ):
        assert not SPEC.is_uniform_with_collection(
            same | {"c": replace(SPEC, **change)}
        )


def test_a_spec_of_full_attention():
    config = SinkConfig(4, 20)
    spec = SinkSpec.from_full(full_spec(16), config)
    assert (spec.policy, spec.is_retrieval) == (config.policy, False)
    windowed = SinkSpec.from_full(full_spec(16), config, 100)
    assert windowed.policy == RetentionPolicy(4, 100) and windowed.is_retrieval
