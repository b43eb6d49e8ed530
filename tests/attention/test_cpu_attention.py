"""The CPU path's plan and tiles against the kernels' reference."""

import functools
import itertools
import os
import platform
import subprocess
import sys

import pytest
import torch
from vllm_sink_kernels import reference
from vllm_sink_kernels.cpu import attention, flash, layouts, micro, native, write
from vllm_sink_kernels.cpu.heads import HeadCaches
from vllm_sink_kernels.cpu.rows import Kind, Slots, Turns

from tests.helpers.pages import loaded, stored
from vllm_sink.rotation.table import RotaryTable

SIZE, DIM = 16, 32


def make_batch(heads, kv_heads, lengths, policy, *, seed=0, dim=DIM, size=SIZE):
    """Permuted blocks; NaN wherever no query of the step may look."""
    torch.manual_seed(seed)
    sinks, window = policy
    width = max(-(-seq_len // size) for _, seq_len in lengths)
    num_blocks = 1 + width * len(lengths)
    order = (torch.randperm(num_blocks - 1) + 1).tolist()
    pages = torch.full((num_blocks, kv_heads, 2 * size, dim), float("nan"))
    # Stale ids, out of range, wherever a row isn't filled in below.
    table = torch.full((len(lengths), width), num_blocks + 7, dtype=torch.int32)
    starts = [0]
    for row, (num_queries, seq_len) in enumerate(lengths):
        first = seq_len - num_queries
        starts.append(starts[-1] + num_queries)
        for block in range(-(-seq_len // size)):
            seen = [
                k
                for k in range(block * size, min((block + 1) * size, seq_len))
                if k < sinks or k > first - window
            ]
            if seen:
                table[row, block] = block_id = order.pop()
                slots = torch.tensor(seen) % size
                for offset in (0, size):
                    shape = (kv_heads, len(seen), dim)
                    pages[block_id, :, slots + offset] = torch.randn(shape)
    q = torch.randn(starts[-1], heads, dim)
    return q, pages, table, starts, [seq_len for _, seq_len in lengths]


def attend(q, pages, plan, out, **options):
    """All heads of one kind, kept in one tensor."""
    attention.attend(q, HeadCaches.of_layer(stored(pages)), plan, out, **options)


def table_rows(rotary_dim: int, length: int = 400) -> torch.Tensor:
    frequency = 10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    angle = torch.arange(length)[:, None] * frequency
    return 1.2 * torch.cat([angle.cos(), angle.sin()], dim=1)  # YaRN's magnitude


@pytest.mark.parametrize("policy", [(4, 60), (0, 33), (1, 1), (20, 13), (40, 400)])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2), (5, 1), (9, 3)])
@pytest.mark.parametrize(
    "rotary, soft_cap, with_logits",
    [(None, 0.0, False), ((32, True), 0.0, True), ((16, False), 8.0, False)],
)
@pytest.mark.parametrize("decode_queries", [0, 8, 1000])
def test_attend_equals_reference(
    policy, heads, kv_heads, rotary, soft_cap, with_logits, decode_queries
):
    lengths = [(1, 1), (1, 130), (3, 3), (150, 300), (17, 81), (1, 64), (2, 65)]
    q, pages, table, starts, seq_lens = make_batch(heads, kv_heads, lengths, policy)
    sinks, window = policy
    logits = torch.randn(heads) if with_logits else None
    turns, rows, is_neox = None, None, True
    if rotary is not None:
        rotary_dim, is_neox = rotary
        rows = table_rows(rotary_dim)
        positions = torch.cat([torch.arange(s - n, s) for n, s in lengths])
        pair = RotaryTable(rows, is_neox).turn(positions, sinks + window)
        turns = Turns((pair,), is_neox)
    tiles = attention.plan(
        [Kind(table, *policy)],
        starts,
        seq_lens,
        block_size=SIZE,
        decode_queries=decode_queries,
    )
    out = torch.full_like(q, float("nan"))
    scale = DIM**-0.5
    common = dict(scale=scale, soft_cap=soft_cap, sink_logits=logits)
    attend(q, pages, tiles, out, turns=turns, **common)
    want = reference.sink_attention(
        q,
        pages[:, :, :SIZE].transpose(1, 2),
        pages[:, :, SIZE:].transpose(1, 2),
        table,
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(seq_lens, dtype=torch.int32),
        num_sink_tokens=sinks,
        window_size=window,
        cos_sin_cache=rows,
        is_neox=is_neox,
        **common,
    )
    assert torch.allclose(out, want, atol=2e-5)


def test_work_does_not_grow_with_the_stream():
    """The plan of one decoded token reads the same at 1,000 and 100,000."""
    work = []
    for seq_len in (1000, 100_000):
        table = torch.arange(-(-seq_len // SIZE), dtype=torch.int32)[None]
        kinds = [Kind(table, 4, 60)]
        token = attention.plan(kinds, [0, 1], [seq_len], block_size=SIZE).decode
        plan = attention.plan(kinds, [0, 100], [seq_len], block_size=SIZE, group_size=6)
        work.append((*token.max_keys, *token.max_parts, len(plan.prefill.tiles)))
        # The table's other entries are out of memory's range.
        table[:, 1 : -(-(seq_len - 200) // SIZE)] = 2**31 - 1
        pages = torch.randn(-(-seq_len // SIZE), 1, 2 * SIZE, DIM)
        out = torch.empty(100, 1, DIM)
        attend(torch.randn(100, 1, DIM), pages, plan, out, scale=1.0)
        assert out.isfinite().all()
    assert work[0] == work[1] == (64, 1, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_write_kv_places_tokens(dtype):
    cache = torch.zeros(3, 2, 2 * SIZE, DIM, dtype=dtype)
    # More tokens than an item of work has; all but the first three are padding.
    key, value = torch.randn(2, 200, 2, DIM).to(dtype)
    slots = torch.full((200,), -1)
    slots[:3] = torch.tensor([2 * SIZE + 5, SIZE, -1])
    slots[199] = 7
    heads = HeadCaches.of_layer(cache)
    write.write_kv(key, value, heads, Slots.of_kinds([slots]))
    pages = loaded(cache)
    assert torch.equal(stored(pages), cache)
    for token, block, slot in [(0, 2, 5), (1, 1, 0), (199, 0, 7)]:
        assert torch.equal(pages[block, :, slot], key[token])
        assert torch.equal(pages[block, :, slot + SIZE], value[token])
    assert int((pages != 0).sum()) == 3 * 2 * 2 * DIM


def test_every_case_of_a_tile_edge():
    """One query at every position equals the whole prefill at once."""
    policy = (3, 5)
    q, pages, table, starts, seq_lens = make_batch(2, 1, [(40, 40)], policy)
    kinds = [Kind(table, *policy)]
    whole = torch.empty_like(q)
    plan = attention.plan(kinds, starts, seq_lens, block_size=SIZE)
    attend(q, pages, plan, whole, scale=1.0)
    for size, position in itertools.product((1, 7), range(0, 35, 3)):
        part = torch.empty(size, 2, DIM)
        plan = attention.plan(kinds, [0, size], [position + size], block_size=SIZE)
        attend(q[position : position + size], pages, plan, part, scale=1.0)
        assert torch.allclose(part, whole[position : position + size], atol=1e-5)


@pytest.mark.parametrize(
    "dtype, dim",
    [
        *[(torch.bfloat16, dim) for dim in (20, 32, 40, 80, 96)],
        *[(torch.float16, dim) for dim in (20, 32)],
        *[(torch.float32, dim) for dim in (17, 40, 80, 256)],
    ],
)
@pytest.mark.parametrize("decode_queries", [0, 1000])
def test_caches_of_any_dtype_and_head_size(dtype, dim, decode_queries):
    """As exact as the reference is on the same rounded inputs, and rounded once."""
    policy = (4, 60)
    lengths = [(1, 130), (3, 3), (40, 181)]
    q, pages, table, starts, seq_lens = make_batch(9, 3, lengths, policy, dim=dim)
    q, pages = q.to(dtype), pages.to(dtype)
    plan = attention.plan(
        [Kind(table, *policy)],
        starts,
        seq_lens,
        block_size=SIZE,
        decode_queries=decode_queries,
    )
    out = torch.full_like(q, float("nan"))
    attend(q, pages, plan, out, scale=0.2)
    want = reference.sink_attention(
        q.float(),
        pages[:, :, :SIZE].transpose(1, 2).float(),
        pages[:, :, SIZE:].transpose(1, 2).float(),
        table,
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(seq_lens, dtype=torch.int32),
        num_sink_tokens=4,
        window_size=60,
        scale=0.2,
    )
    rounding = torch.finfo(dtype).eps * want.abs() / 2
    assert ((out.float() - want).abs() <= rounding + 2e-5).all()


@pytest.mark.parametrize("has_dot", [False, True])
def test_bfloat16_with_and_without_products_of_pairs(has_dot, monkeypatch):
    """Whichever of the two this CPU does not choose is right, too."""
    if has_dot and not {"avx512bf16", "avx512f"} <= native.FEATURES:
        pytest.skip("the CPU has none")
    monkeypatch.setattr(micro, "HAS_DOT", has_dot)
    monkeypatch.setattr(flash, "loop", functools.cache(flash.loop.__wrapped__))
    for decode_queries in (0, 1000):
        test_caches_of_any_dtype_and_head_size(torch.bfloat16, 40, decode_queries)


@pytest.mark.parametrize(
    "layout, dim",
    [
        *[(layouts.PLAIN, dim) for dim in (20, 64)],
        *[(layouts.TILED, dim) for dim in (32, 96)],
    ],
)
@pytest.mark.parametrize("policy", [(4, 60), (3, 33), (0, 1), (40, 400)])
@pytest.mark.parametrize("decode_queries", [0, 1000])
def test_pages_as_vllms_kernels_lay_them_out(layout, dim, policy, decode_queries):
    """bfloat16 keys as they are, and in AMX's tiles; NaN beside what is seen."""
    if not layouts.fits(layout, torch.bfloat16, 32, dim):
        pytest.skip("tiles of 16 need vectors of 16")
    lengths = [(1, 130), (1, 129), (3, 3), (40, 181), (37, 37), (4, 66)]
    q, pages, table, starts, seq_lens = make_batch(
        6, 2, lengths, policy, dim=dim, size=32
    )
    q, pages = q.bfloat16(), pages.bfloat16()
    plan = attention.plan(
        [Kind(table, *policy)],
        starts,
        seq_lens,
        block_size=32,
        decode_queries=decode_queries,
    )
    out = torch.full_like(q, float("nan"))
    caches = HeadCaches.of_layer(stored(pages, layout), layout)
    positions = torch.cat([torch.arange(s - n, s) for n, s in lengths])
    rows = table_rows(dim)
    turns = Turns((RotaryTable(rows, True).turn(positions, sum(policy)),), True)
    attention.attend(q, caches, plan, out, scale=0.2, turns=turns)
    want = reference.sink_attention(
        q.float(),
        pages[:, :, :32].transpose(1, 2).float(),
        pages[:, :, 32:].transpose(1, 2).float(),
        table,
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(seq_lens, dtype=torch.int32),
        num_sink_tokens=policy[0],
        window_size=policy[1],
        cos_sin_cache=rows,
        is_neox=True,
        scale=0.2,
    )
    rounding = torch.finfo(torch.bfloat16).eps * want.abs() / 2
    assert ((out.float() - want).abs() <= rounding + 2e-5).all()


@pytest.mark.parametrize("layout", [layouts.OWN, layouts.PLAIN, layouts.TILED])
def test_the_layouts_formula_is_the_pages(layout):
    pages = torch.randn(1, 1, 2 * 64, 32).bfloat16()
    page = layouts.arrange(pages[0, 0, :64], pages[0, 0, 64:], layout)
    assert torch.equal(page, stored(pages, layout)[0, 0])


def test_any_number_of_threads_gives_the_same():
    """Which thread takes which split changes no bit of the result."""
    q, pages, table, starts, seq_lens = make_batch(8, 2, [(3, 390)] * 4, (4, 380))
    kinds = [Kind(table, 4, 380)]
    num_floats = 2 * 4 * 384 * 2 * DIM
    assert num_floats > flash.SERIAL_FLOATS, "one thread is used anyway"
    num_threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            plan = attention.plan(kinds, starts, seq_lens, block_size=SIZE)
            for _ in range(20):  # again on the counters that the last run left
                out = torch.full_like(q, float("nan"))
                attend(q, pages, plan, out, scale=0.3)
                results.append(out)
    finally:
        torch.set_num_threads(num_threads)
    assert results[0].isfinite().all()
    for out in results:
        assert torch.equal(out, results[0])


POLICIES = [(4, 60), (4, 400), (0, 33), (20, 13)]


@pytest.mark.parametrize(
    "kinds_of_heads",
    [(0, 1), (1, 1), (0, 1, 0), (2, 0, 3), (1, 0, 0, 3, 1), (3,)],
)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("decode_queries", [0, 8, 1000])
@pytest.mark.parametrize("cached", [True, False])
def test_heads_with_policies_of_their_own(
    kinds_of_heads, group, decode_queries, cached
):
    """Each head as the reference with its policy, from a cache of its own."""
    lengths = [(1, 1), (1, 390), (3, 3), (150, 300), (17, 81), (2, 65)]
    positions = torch.cat([torch.arange(s - n, s) for n, s in lengths])
    rows = table_rows(DIM)
    batches = [make_batch(1, 1, lengths, p, seed=i) for i, p in enumerate(POLICIES)]
    kinds = [
        Kind(table, *policy)
        for (_, _, table, _, _), policy in zip(batches, POLICIES, strict=True)
    ]
    _, _, _, starts, seq_lens = batches[0]
    # Another cache of the same blocks for every head; NaN stays NaN.
    caches = [
        batches[kind][1] * (1 + head / 8) for head, kind in enumerate(kinds_of_heads)
    ]
    turns = None
    if cached:
        # Of a kind that no query outgrows there is no turn to make.
        rotation = RotaryTable(rows, True)
        turns = Turns(
            tuple(
                None if sum(p) >= 390 or p[0] == 0 else rotation.turn(positions, sum(p))
                for p in POLICIES
            ),
            True,
        )
    q = torch.randn(starts[-1], group * len(kinds_of_heads), DIM)
    logits = torch.randn(q.shape[1])
    plan = attention.plan(
        kinds, starts, seq_lens, block_size=SIZE, decode_queries=decode_queries
    )
    out = torch.full_like(q, float("nan"))
    attention.attend(
        q,
        HeadCaches.of_heads([stored(x) for x in caches], kinds_of_heads),
        plan,
        out,
        scale=DIM**-0.5,
        turns=turns,
        sink_logits=logits,
    )
    for head, (kind, pages) in enumerate(zip(kinds_of_heads, caches, strict=True)):
        mine = slice(head * group, (head + 1) * group)
        want = reference.sink_attention(
            q[:, mine],
            pages[:, :, :SIZE].transpose(1, 2),
            pages[:, :, SIZE:].transpose(1, 2),
            kinds[kind].block_table,
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor(seq_lens, dtype=torch.int32),
            num_sink_tokens=POLICIES[kind][0],
            window_size=POLICIES[kind][1],
            cos_sin_cache=rows if cached else None,
            scale=DIM**-0.5,
            sink_logits=logits[mine],
        )
        assert torch.allclose(out[:, mine], want, atol=2e-5), f"head {head}"


def test_write_kv_places_each_heads_tokens_by_its_kind():
    caches = [torch.zeros(3, 1, 2 * SIZE, DIM) for _ in range(3)]
    key, value = torch.randn(2, 3, DIM), torch.randn(2, 3, DIM)
    slots = torch.tensor([[SIZE + 5, 0], [2 * SIZE + 1, -1]])
    heads = HeadCaches.of_heads(caches, (0, 1, 0))
    write.write_kv(key, value, heads, Slots.of_kinds(slots.unbind()))
    caches = [loaded(x) for x in caches]
    places = [(0, 0, 1, 5), (0, 1, 0, 0), (1, 0, 2, 1), (2, 0, 1, 5), (2, 1, 0, 0)]
    for head, token, block, slot in places:
        assert torch.equal(caches[head][block, 0, slot], key[token, head])
        assert torch.equal(caches[head][block, 0, slot + SIZE], value[token, head])
    assert sum(int((x != 0).sum()) for x in caches) == len(places) * 2 * DIM


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86's older vectors")
def test_a_cpu_with_avx2_only():
    """Half the lanes, half the registers, no products of bfloat16."""
    features = "+avx2,+avx,+fma,+f16c,+sse4.2,+sse4.1,+ssse3,+sse3,+bmi,+bmi2,+popcnt"
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": features,
        "OMP_NUM_THREADS": "2",
    }
    code = """
from vllm_sink_kernels.cpu import micro
assert micro.LANES == 8 and not micro.HAS_DOT, micro.FEATURES
import torch
from tests.attention import test_cpu_attention as tests
tests.test_caches_of_any_dtype_and_head_size(torch.bfloat16, 40, 8)
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=300, env=environment
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loops_run_in_torchs_own_threads():
    """No second pool: the seam that ``native`` describes has not moved."""
    code = """
import os, torch
from vllm_sink_kernels.cpu import native, write
from vllm_sink_kernels.cpu.heads import HeadCaches
from vllm_sink_kernels.cpu.rows import Slots
loop = write.loop(torch.float32)  # the compiler has a thread, too
torch.set_num_threads(4)
torch.randn(1000, 1000).exp()  # starts torch's threads
before = set(os.listdir("/proc/self/task"))
assert native._parallel() is not None
caches = HeadCaches.of_layer(torch.zeros(1, 1, 32, 8))
slots = Slots(torch.zeros(1, 100_000, dtype=torch.int64))
key = torch.randn(100_000, 1, 8)
job = write._job(key, key, caches, slots)
for _ in range(10):
    native.run(loop, job, 4)
after = set(os.listdir("/proc/self/task"))
assert len(before) >= 4 and after == before, (before, after)
pieces = -(-100_000 // write.TOKENS)
assert job.next_item == pieces + 4, job.next_item  # every thread came
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
