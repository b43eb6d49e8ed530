"""A step's plan on the CPU: the turn of each query, the cache of each head."""

import torch
from vllm_sink_kernels.cpu.rows import Kind

from vllm_sink.attention import cpu
from vllm_sink.rotation.table import RotaryTable


def rotation() -> RotaryTable:
    angle = torch.arange(100)[:, None] * torch.tensor([1.0, 0.1])
    return RotaryTable(torch.cat([angle.cos(), angle.sin()], dim=1), True)


def part(policy: tuple[int, int], turned: RotaryTable) -> cpu.SinkCpuMetadata:
    table = torch.zeros(2, 8, dtype=torch.int32)
    rotations = {id(turned.rows): turned}
    return cpu.SinkCpuMetadata(Kind(table, *policy), torch.zeros(3), rotations)


def test_each_group_turns_by_its_own_budget():
    turned = rotation()
    parts = [part((4, 60), turned), part((4, 20), turned)]
    # Two requests: positions 63 and 64, and 29.
    (turns,) = cpu._turns(parts, 3, [0, 2, 3], [65, 30]).values()
    positions = torch.tensor([63, 64, 29])
    for pair, budget in zip(turns.pairs, (64, 24), strict=True):
        for got, want in zip(pair, turned.turn(positions, budget), strict=True):
            assert torch.equal(got, want)


def test_the_turn_begins_with_the_first_query_past_the_budget():
    turned = rotation()
    one = [part((4, 60), turned)]
    assert cpu._turns(one, 2, [0, 2], [64]) == {}
    assert len(cpu._turns(one, 2, [0, 2], [65])) == 1
    (turns,) = cpu._turns([*one, part((4, 20), turned)], 2, [0, 2], [64]).values()
    assert turns.pairs[0] is None and turns.pairs[1] is not None


def test_a_layers_caches_are_those_that_it_is_given():
    impl = cpu.SinkCpuImpl(2, 32, 1.0, 1)
    first, second = torch.zeros(2, 3, 1, 16, 64)
    caches = impl._head_caches(first)
    assert impl._head_caches(first) is caches, "made once"
    assert impl._head_caches(second).tensors[0].data_ptr() == second.data_ptr()
