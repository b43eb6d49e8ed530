"""Heads in the pages that a model's other layers make: memory, and vLLM's grouping."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import (
    KVCacheLayout,
    MambaSpec,
    SlidingWindowSpec,
)

from vllm_sink.cache.head_slots import SlottedHead
from vllm_sink.cache.spec import OwnWindowSpec, RetrievalSpec, SinkSpec, SlotSpec
from vllm_sink.plugin import compat
from vllm_sink.policy.config import SinkConfig
from vllm_sink.policy.draft_heads import DraftHeads
from vllm_sink.policy.head_map import HeadMap
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.policy.slot_workers import SlotHeads, slots_of_workers
from vllm_sink.policy.slots import (
    LENGTH,
    MAX_GROUPS,
    LayersBeside,
    SlotGrouping,
    SlotMemory,
    choose_slots,
    slots_of,
    vllm_group_size,
)

try:  # vLLM 0.33
    from vllm.v1.core import kv_cache_planning as planning
except ImportError:
    planning = kv_cache_utils

POLICY = RetentionPolicy(4, 4092)


def memory_of(
    retrieval, streaming, beside, head_size, kv_heads, block_size, policy=POLICY
) -> SlotMemory:
    """Of bfloat16 heads in pages of ``block_size`` tokens in all ``kv_heads``."""
    unit = 2 * head_size * 2
    page = block_size * kv_heads * unit
    grouping = choose_slots(
        [SlotHeads(retrieval, streaming)],
        beside,
        policy,
        None,
        slots=slots_of(page, unit, block_size),
    )
    layers = (retrieval + streaming) // kv_heads
    counts = (retrieval, streaming)
    return SlotMemory(
        grouping, page, unit, counts, policy, None, tuple(beside), layers, block_size
    )


def gpt_oss(block_size=16) -> SlotMemory:
    """20b: 24 layers, every other with a window of 128; 8 KV heads of 64."""
    own = LayersBeside(12, block_size, 128, kept_bytes=8 * 2 * 64 * 2)
    return memory_of(24, 72, [own], 64, 8, block_size)


def gemma(block_size=16) -> SlotMemory:
    """3 27B: 62 layers, 10 with full attention; 16 KV heads of 128."""
    own = LayersBeside(52, block_size, 1024, kept_bytes=16 * 2 * 128 * 2)
    return memory_of(40, 120, [own], 128, 16, block_size)


def qwen(num_states=1) -> SlotMemory:
    """3.6 27B: 64 layers, 16 with full attention; a state fills 784 tokens' page."""
    state = 48 * 128 * 128 * 4 + (2 * 16 * 128 + 48 * 128) * 3 * 2
    own = LayersBeside(48, 784, None, num_states, kept_bytes=num_states * state)
    return memory_of(16, 48, [own], 256, 4, 784)


@pytest.mark.parametrize(
    "memory",
    [gpt_oss(), gpt_oss(128), gemma(), gemma(128), qwen(), qwen(2)],
    ids=["gpt-oss", "gpt-oss, 128", "Gemma 3", "Gemma 3, 128", "Qwen 3.6", "cached"],
)
def test_a_quarter_of_the_heads_takes_what_they_keep(memory):
    """Within 1.15 of the tokens kept, from 32,768 tokens on, in few groups."""
    assert memory.grouping.num_groups <= MAX_GROUPS
    ratios = [memory.bytes(n) / memory.kept_bytes(n) for n in (LENGTH, 65536, 131072)]
    print(memory.grouping, ratios)
    assert min(ratios) >= 1 and max(ratios) <= 1.15
    assert memory.bytes(131072) < 0.45 * memory.dense_bytes(131072)


def test_the_tokens_of_a_block_end_where_the_engines_do():
    """So that prefix hits do: divisors and multiples, and what fits the page."""
    found = list(slots_of(784 * 4 * 1024, 1024, 784))
    assert (4, 784) in found and (28, 112) in found and (1, 3136) in found
    for heads, tokens in found:
        assert heads * tokens <= 784 * 4
        assert 784 % tokens == 0 or tokens % 784 == 0, tokens
        assert tokens % 16 == 0


def test_kept_and_dense_bytes():
    memory = gpt_oss()
    unit = 2 * 64 * 2
    kept = 24 * 10_000 + 72 * 4096 + 12 * 8 * 128
    assert memory.kept_bytes(10_000) == kept * unit
    # Stock: a group of 12 full layers and one of 12 windows of 8 + 1 blocks.
    assert memory.dense_bytes(10_000) == 12 * (625 + 9) * 16 * 8 * unit


def test_ranks_are_counted_by_the_heads_of_governed_layers():
    heads = HeadMap(((), (True, False, False, True), (), (True, True, False, False)))
    assert slots_of_workers(heads, 2) == {
        (0, range(2)): SlotHeads(3, 1),
        (0, range(2, 4)): SlotHeads(1, 3),
    }
    layers = HeadMap(((), (True, True), (False, False), (False, False)))
    assert slots_of_workers(layers, 2) == {(0, range(1)): SlotHeads(1, 2)}
    # Stages and a drafter have them divided into heads.
    halves = [range(2), range(2, 4)]
    assert slots_of_workers(layers, 1, halves) == {
        (0, range(2)): SlotHeads(2, 0),
        (1, range(2)): SlotHeads(0, 4),
    }
    draft = DraftHeads(1, 2, is_retrieval=False)
    assert slots_of_workers(layers, 1, (), draft) == {
        (0, range(2)): SlotHeads(2, 4, (0, 2))
    }


def test_a_drafters_slots_fit_into_one_group():
    """Six heads beside the last worker's, of a model with four."""
    draft = DraftHeads(3, 2, is_retrieval=True)
    heads = HeadMap(((), (True, False), (), (False, False)))
    stages = [range(2), range(2, 4)]
    workers = slots_of_workers(heads, 1, stages, draft)
    assert workers == {
        (0, range(2)): SlotHeads(1, 1),
        (1, range(2)): SlotHeads(0, 2, (6, 0)),
    }
    assert [x.counts for x in workers.values()] == [(1, 1), (6, 2)]
    assert workers[1, range(2)].num_slots(4) == (2, 1)
    assert SlotHeads(3, 0, (3, 0)).num_slots(2) == (4, 0)  # none is of both
    own = [LayersBeside(24, 16, 128, of_stages=(24, 24))]
    grouping = choose_slots(
        workers.values(), own, POLICY, None, slots=[(1, 16)], num_stages=2
    )
    assert grouping.size >= 6
    own = [LayersBeside(2, 16, 128, of_stages=(2, 2))]
    with pytest.raises(ValueError, match=r"fit into one group .* got 6 beside"):
        choose_slots(workers.values(), own, POLICY, None, slots=[(1, 16)], num_stages=2)


def test_a_block_is_as_wide_as_its_widest_group():
    """Nine layers of a stage, dealt out to two groups."""
    grouping = SlotGrouping(4, 1, 1, (2, 1), 1, 16)
    assert grouping.width([8, 4]) == 4 and grouping.width([9, 4]) == 5


@pytest.mark.parametrize(
    "counts, size",
    [([10, 52], 10), ([12, 17], 17), ([12, 18], 12), ([4, 4, 4], 4)],
)
def test_vllms_rule(counts, size):
    assert vllm_group_size(counts) == size


SHAPE = {"head_size": 64, "dtype": torch.bfloat16}
UNIT = 2 * 64 * 2
OWN = OwnWindowSpec.from_window(
    SlidingWindowSpec(block_size=16, num_kv_heads=8, sliding_window=128, **SHAPE)
)
PAGE = OWN.page_size_bytes
STATE = MambaSpec(
    block_size=16,
    shapes=((PAGE // 4 - 8,),),
    dtypes=(torch.float32,),
    page_size_padded=PAGE,
)


def specs_of(grouping: SlotGrouping, beside: dict) -> dict:
    """Specs of a worker's slots as vLLM gets them, and of its other layers."""
    shape = SHAPE | {
        "num_kv_heads": grouping.heads_per_slot,
        "block_size": grouping.tokens_per_block,
    }
    if grouping.heads_per_slot * grouping.tokens_per_block * UNIT < PAGE:
        shape["page_size_padded"] = PAGE
    specs = dict(beside)
    for kind in (True, False):
        for i in range(grouping.num_slots(kind)):
            slot = SlotSpec(**shape, part=i // grouping.size)
            spec = RetrievalSpec.from_full(slot)
            if not kind:
                spec = SinkSpec.from_full(slot, SinkConfig())
            specs[f"layers.1.{'streaming' if not kind else 'retrieval'}{i}"] = spec
    return specs


@pytest.mark.parametrize("layout", [KVCacheLayout.LBHNC, KVCacheLayout.BLHNC])
@pytest.mark.parametrize("counts", [(24, 72), (1, 95), (90, 6), (5, 3), (40, 40)])
@pytest.mark.parametrize("num_beside", [1, 4, 12, 30])
@pytest.mark.parametrize("kind", ["windows", "states", "both"])
def test_vllm_groups_as_planned(kind, num_beside, counts, layout):
    """Each group has the planned slots, of one part, beside whatever layers."""
    compat.register_kv_cache_spec()
    names = {"windows": [OWN], "states": [STATE], "both": [OWN, STATE]}[kind]
    beside = {
        f"layers.{i}.{type(spec).__name__}": spec
        for i in range(num_beside)
        for spec in names
    }
    kinds = [
        LayersBeside(num_beside, 16, 128 if spec is OWN else None, int(spec is STATE))
        for spec in names
    ]
    grouping = choose_slots(
        [SlotHeads(*counts)], kinds, POLICY, None, slots=slots_of(PAGE, UNIT, 16)
    )
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: layout),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
    )
    specs = specs_of(grouping, beside)
    groups = planning.get_kv_cache_groups(config, specs)
    assert len(groups) == grouping.num_groups
    places = grouping.heads_per_slot
    assert places * grouping.num_slots(True) >= counts[0]
    assert places * grouping.num_slots(False) >= counts[1]
    found = {RetrievalSpec: 0, SinkSpec: 0}
    for group in groups:
        members = {replace_part(specs[name]) for name in group.layer_names}
        assert members == {replace_part(group.kv_cache_spec)}
        if (own := type(group.kv_cache_spec)) in found:
            found[own] += 1
            assert len(group.layer_names) == grouping.size
            assert len({specs[name].part for name in group.layer_names}) == 1
            assert group.kv_cache_spec.part == 0
        assert len(group.layer_names) <= grouping.size
        assert group.kv_cache_spec.page_size_bytes == PAGE
    assert found[RetrievalSpec] == grouping.num_retrieval
    assert found[SinkSpec] == grouping.num_streaming


def replace_part(spec):
    return replace(spec, part=0) if hasattr(spec, "part") else spec


def test_whole_layers_are_grouped_by_vllms_rule():
    """Layers that are not split: counts that vLLM's rule leaves at that size."""
    own = LayersBeside(12, 16, 128)
    grouping = choose_slots(
        [SlotHeads(3, 9)], [own], POLICY, None, slots=[(1, 16)], is_divided=False
    )
    kinds = [grouping.num_slots(True), grouping.num_slots(False), 12]
    assert vllm_group_size(kinds) == grouping.size
    assert grouping.num_slots(True) >= 3 and grouping.num_slots(False) >= 9
    assert (grouping.heads_per_slot, grouping.tokens_per_block) == (1, 16)


def test_a_head_is_read_at_its_place_in_the_slot():
    slot = SimpleNamespace(kv_cache=torch.arange(24.0).view(2, 3, 2, 2))
    for place in range(3):
        head = SlottedHead(SimpleNamespace(), False)
        head.slot, head.place = slot, place
        assert torch.equal(head.kv_cache, slot.kv_cache[:, place, None])
