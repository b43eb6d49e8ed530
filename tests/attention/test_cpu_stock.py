"""Rows that see everything go to vLLM's own CPU kernel, with the same results."""

import platform

import pytest
import torch
from vllm.platforms import current_platform
from vllm_sink_kernels import reference
from vllm_sink_kernels.cpu import layouts
from vllm_sink_kernels.cpu.rows import Kind

from tests.helpers.engine import prompt_logprobs, sink_engine
from tests.helpers.pages import stored
from vllm_sink.attention import cpu, cpu_stock
from vllm_sink.attention.base import Step

current_platform.import_kernels()
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86's variants")
HEADS, KV_HEADS, N = 6, 2, 32


@x86
@pytest.mark.parametrize(
    "isa, dtype, layout",
    [
        *[(isa, torch.float32, layouts.OWN) for isa in ("vec", "vec16")],
        *[(isa, torch.float16, layouts.OWN) for isa in ("vec", "vec16")],
        *[(isa, torch.bfloat16, layouts.PLAIN) for isa in ("vec", "vec16")],
        ("amx", torch.bfloat16, layouts.TILED),
    ],
)
@pytest.mark.parametrize("head_size", [64, 96])
def test_layouts_are_measured(isa, dtype, layout, head_size):
    """What vLLM writes is what the loops read; AMX's tiles are written anywhere."""
    if not layouts.fits(layout, dtype, N, head_size):
        pytest.skip("tiles of 16 need vectors of 16")
    assert cpu_stock.measured_layout(isa, dtype, N, head_size) == layout
    kernel = cpu_stock.StockKernel(isa, layout)
    key, value = torch.randn(2, 2 * N, KV_HEADS, head_size).to(dtype)
    pages = torch.zeros(2, KV_HEADS, 2 * N, head_size, dtype=dtype)
    kernel.write(key, value, pages, torch.arange(2 * N))
    want = torch.cat(
        [x.view(2, N, KV_HEADS, -1).transpose(1, 2) for x in (key, value)], 2
    )
    assert torch.equal(stored(want, layout), pages)


def test_a_layout_that_is_not_known_is_not_borrowed(monkeypatch):
    def write(key, value, keys, values, slots, isa):
        keys.copy_(key[:, 0].flip(0).T.reshape(keys.shape))

    monkeypatch.setattr(cpu_stock.ops, "cpu_attn_reshape_and_cache", write)
    assert cpu_stock.measured_layout("new", torch.float32, N, 64) is None


@x86
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_answers_wrong_is_not_borrowed(dtype, monkeypatch):
    monkeypatch.setattr(cpu_stock.cpu_attn, "_get_attn_isa", lambda *x: "vec")
    choose = cpu_stock._faster_kernel.__wrapped__
    assert choose(dtype, N, 64, "always") is not None
    run = cpu_stock.ops.cpu_attention_with_kv_cache

    def sees_all(**arguments):
        run(**{**arguments, "causal": False})

    monkeypatch.setattr(cpu_stock.ops, "cpu_attention_with_kv_cache", sees_all)
    assert choose(dtype, N, 64, "always") is None


@pytest.mark.parametrize(
    "wish, isa, found",
    [
        ("", "amx", True),
        ("", "vec", False),
        ("always", "vec", True),
        ("never", "amx", False),
    ],
)
def test_where_it_is_the_faster_one(wish, isa, found, monkeypatch):
    monkeypatch.setattr(cpu_stock.cpu_attn, "_get_attn_isa", lambda *x: isa)
    monkeypatch.setattr(cpu_stock, "measured_layout", lambda *x: layouts.OWN)
    monkeypatch.setattr(cpu_stock, "answers_right", lambda *x: True)
    choose = cpu_stock._faster_kernel.__wrapped__
    kernel = choose(torch.bfloat16, 128, 64, wish)
    assert kernel == (cpu_stock.StockKernel(isa, layouts.OWN) if found else None)
    assert choose(torch.bfloat16, 16, 64, wish) is None, "vLLM's blocks are of 32"
    assert choose(torch.bfloat16, 128, 40, wish) is None, "no head size of vLLM's"


@pytest.mark.parametrize(
    "setting", [dict(heads=(1,)), dict(soft_cap=30.0), dict(sink_logits=torch.zeros(6))]
)
def test_layers_of_other_kinds_stay_ours(setting, monkeypatch):
    monkeypatch.setenv(cpu_stock.VARIABLE, "always")
    impls = [cpu.SinkCpuImpl(HEADS, 64, 0.125, KV_HEADS) for _ in range(2)]

    class Spec:
        dtype, block_size, head_size = torch.float32, N, 64

    assert cpu_stock.faster_kernel(Spec, torch.float32, impls) is not None
    assert cpu_stock.faster_kernel(Spec, torch.bfloat16, impls) is None
    for name, value in setting.items():
        setattr(impls[1], name, value)
    assert cpu_stock.faster_kernel(Spec, torch.float32, impls) is None


def test_rows_are_a_requests_first_up_to_the_budget():
    kind = Kind(torch.arange(15, dtype=torch.int32).view(5, 3), 4, 60)
    starts, lens = [0, 3, 4, 14, 15, 20], [3, 65, 70, 64, 90]
    rows = cpu_stock.StockRows.of_step(kind, starts, lens)
    # The third's queries are at 60 to 69: those at 60 to 63 see everything.
    assert rows.counts == [3, 0, 4, 1, 0]
    assert rows.rows.tolist() == [0, 1, 2, 4, 5, 6, 7, 14]
    assert rows.query_start_loc.tolist() == [0, 3, 7, 8]
    assert rows.seq_lens.tolist() == [3, 64, 64]
    assert torch.equal(rows.block_table, kind.block_table[[0, 2, 3]])
    assert cpu_stock.StockRows.of_step(kind, [0, 1], [65]) is None
    assert cpu_stock.StockRows.of_step(kind, [0, 2, 3], [64, 9]).rows == slice(0, 3)


def test_blocks_are_cleared_as_they_are_begun():
    """Begun and not filled in the same step."""
    slots = torch.tensor([*range(64, 96), *range(128, 140), *range(40, 50), -1])
    assert cpu_stock.begun_blocks(slots, 32).tolist() == [4]


@x86
@pytest.mark.parametrize(
    "isa, dtype, head_size, borrows",
    [
        ("vec", torch.float32, 64, True),
        ("vec", torch.bfloat16, 64, True),
        ("vec16", torch.bfloat16, 80, True),
        ("vec", torch.float16, 64, True),
        ("amx", torch.bfloat16, 64, False),  # writes anywhere, attends with AMX only
    ],
)
def test_streams_over_the_budget_in_reused_blocks(isa, dtype, head_size, borrows):
    """Below, across and past S + W, on memory full of NaN, blocks of the gap reused."""
    sinks, window = 4, 60
    layout = cpu_stock.measured_layout(isa, dtype, N, head_size)
    if layout is None:
        pytest.skip("tiles of 16 need vectors of 16")
    impl = cpu.SinkCpuImpl(HEADS, head_size, 0.125, KV_HEADS)
    impl.stock = cpu_stock.StockKernel(isa, layout)
    kv_cache = torch.full((12, KV_HEADS, N, 2 * head_size), float("nan")).to(dtype)
    torch.manual_seed(0)
    length = 256
    q = torch.randn(2, length, HEADS, head_size).to(dtype)
    k, v = torch.randn(2, 2, length, KV_HEADS, head_size).to(dtype)
    table = torch.full((2, 8), 10_000, dtype=torch.int32)
    free, done = list(range(1, 12)), [0, 0]
    given, seen = 0, torch.full_like(q, float("nan"))
    # Queries of a step: a chunk below, across and past the budget, tokens, both.
    steps = [(40, 0), (20, 3), (30, 1), (1, 1), (1, 62), (1, 1), (50, 40), (1, 9)]
    for counts in [*steps, (40, 9), (1, 1), (60, 60)]:
        parts, slots, starts, lens = [], [], [0], []
        for i, count in enumerate(counts):
            if not count:
                continue
            begin, done[i] = done[i], done[i] + count
            for block in range(-(-begin // N), -(-done[i] // N)):
                table[i, block] = free.pop()
            places = torch.arange(begin, done[i])
            slots.append(table[i, places // N].long() * N + places % N)
            starts.append(starts[-1] + count)
            lens.append(done[i])
            parts.append((i, begin, done[i]))
        own = table[[i for i, _, _ in parts]]
        metadata = cpu.SinkCpuMetadata(Kind(own, sinks, window), torch.cat(slots), {})
        metadata.step = Step(None, 1)
        metadata.step.parts[0] = metadata

        class Common:
            num_actual_tokens, num_reqs = starts[-1], len(parts)
            query_start_loc_cpu, seq_lens = torch.tensor(starts), torch.tensor(lens)

        kernel = impl.stock if borrows else None
        plan = cpu._plan([metadata], Common, N, HEADS // KV_HEADS, kernel)
        given += sum(plan.stock_rows.counts) if plan.stock_rows else 0
        metadata.step.plan = plan
        step = [torch.cat([x[i, a:b] for i, a, b in parts]) for x in (q, k, v)]
        out = torch.full_like(step[0], float("nan"))
        impl.forward(None, *step, kv_cache, metadata, out)
        for (i, a, b), rows in zip(
            parts, out.split([b - a for _, a, b in parts]), strict=True
        ):
            seen[i, a:b] = rows
            # The gap of the next query: its blocks are another's from now on.
            for block in range(-(-sinks // N), max(0, b - window + 1) // N):
                if table[i, block] < 10_000:
                    free.insert(0, int(table[i, block]))
                    table[i, block] = 10_000
    assert free and max(free) < 12 and sum(done) > 11 * N, "blocks were reused"
    assert given == (2 * (sinks + window) if borrows else 0)
    pages = torch.cat([k, v], 1).view(2, 2, length, KV_HEADS, head_size).float()
    for i in range(2):
        n = done[i]
        want = reference.sink_attention(
            q[i, :n].float(),
            pages[i, 0][None],
            pages[i, 1][None],
            torch.zeros(1, 1, dtype=torch.int32),
            torch.tensor([0, n], dtype=torch.int32),
            torch.tensor([n], dtype=torch.int32),
            num_sink_tokens=sinks,
            window_size=window,
            scale=0.125,
        )
        # vLLM's kernel rounds the weights, too.
        eps = torch.finfo(dtype).eps
        assert ((seen[i, :n].float() - want).abs() <= 4 * eps + 2e-5).all(), i


def test_an_engine_that_borrows_equals_the_reference(
    model_path, reference, prose, monkeypatch
):
    monkeypatch.setenv(cpu_stock.VARIABLE, "always")
    prompts = [prose[:300], prose[5000:5064], prose[9000:9003]]
    options = dict(block_size=32, max_num_batched_tokens=48, max_model_len=512)
    with sink_engine(model_path, 4, 60, max_num_seqs=4, **options) as llm:
        impls = llm.apply_model(
            lambda model: [x.impl for x in model.modules() if hasattr(x, "impl")]
        )[0]
        assert impls and all(impl.stock is not None for impl in impls)
        measured = prompt_logprobs(llm, prompts)
    for tokens, got in zip(prompts, measured, strict=True):
        want = reference.logprobs(tokens, 4, 60, "cache")
        assert (got - want).abs().max() < 2e-3
