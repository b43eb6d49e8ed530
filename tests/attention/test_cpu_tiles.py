"""Prompts multiplied in AMX's tiles: emulated in memory where the CPU has none.

``test_cpu_amx.py`` runs this file with AMX's own instructions.
"""

import platform
import re
from types import SimpleNamespace

import llvmlite.binding as llvm
import pytest
import torch
from llvmlite import ir
from vllm_sink_kernels import reference
from vllm_sink_kernels.cpu import amx, amx_check, attention, flash, layouts, native
from vllm_sink_kernels.cpu.heads import HeadCaches
from vllm_sink_kernels.cpu.rows import Kind, Turns
from vllm_sink_kernels.cpu.tile_ops import made_function

from tests.attention import test_cpu_stock as tests
from tests.attention.test_cpu_attention import make_batch, table_rows
from tests.helpers.pages import stored
from vllm_sink.attention import cpu
from vllm_sink.rotation.table import RotaryTable

BF16 = torch.bfloat16
HAS_AMX = {"amx-tile", "amx-bf16"} <= native.FEATURES and amx_check.is_granted()
KIND = amx.AMX if HAS_AMX else amx.EMULATED
vectors_of_16 = pytest.mark.skipif(
    native.LANES != 16, reason="tiles of 16 need vectors of 16"
)
with_amx = pytest.mark.skipif(not HAS_AMX, reason="vLLM's kernel has AMX's own")


class Step:
    """A step of bfloat16, attended to in emulated tiles, and what it should be.

    Args:
        lengths: Query tokens and length of each request.
        poison: Of the pages [B, HKV, 2N, D], before they are stored.
    """

    def __init__(
        self, lengths, policy, heads, layout, size, dim, poison=None, **options
    ):
        q, pages, table, starts, seq_lens = make_batch(
            *heads, lengths, policy, dim=dim, size=size
        )
        q, pages = q.to(BF16), pages.to(BF16)
        if poison is not None:
            poison(pages, table)
        positions = torch.cat([torch.arange(s - n, s) for n, s in lengths])
        rows = table_rows(dim, 800)
        turns = Turns((RotaryTable(rows, True).turn(positions, sum(policy)),), True)
        plan = attention.plan(
            [Kind(table, *policy)],
            starts,
            seq_lens,
            block_size=size,
            group_size=heads[0] // heads[1],
        )
        self.out = torch.full_like(q, float("nan"))
        common = dict(scale=dim**-0.5, **options)
        caches = HeadCaches.of_layer(stored(pages, layout), layout)
        attention.attend(q, caches, plan, self.out, turns=turns, **common)
        self.in_tiles = [
            x._jobs[flash.Job].room_bytes > 0 for x in (plan.decode, plan.prefill) if x
        ]

        def answer(dtype):
            return reference.sink_attention(
                q.to(dtype),
                pages[:, :, :size].transpose(1, 2).to(dtype),
                pages[:, :, size:].transpose(1, 2).to(dtype),
                table,
                torch.tensor(starts, dtype=torch.int32),
                torch.tensor(seq_lens, dtype=torch.int32),
                num_sink_tokens=policy[0],
                window_size=policy[1],
                cos_sin_cache=rows,
                is_neox=True,
                compute_dtype=dtype,
                **common,
            ).double()

        self.want, self.low = answer(torch.float64), answer(BF16)


@pytest.fixture
def in_tiles(monkeypatch):
    """Every loop that can, multiplies in tiles."""
    monkeypatch.setattr(amx_check, "chosen", lambda *x: KIND)


@vectors_of_16
@pytest.mark.parametrize("layout, size", [(layouts.OWN, 16), (layouts.TILED, 32)])
@pytest.mark.parametrize("policy", [(4, 60), (20, 33), (2, 697)])
@pytest.mark.parametrize(
    "heads, dim, options",
    [
        ((6, 2), 64, {}),
        ((5, 1), 32, dict(soft_cap=8.0)),
        ((2, 2), 96, dict(sink_logits=torch.tensor([0.5, -1.0]))),
    ],
)
def test_prompts_in_tiles_equal_the_reference(
    layout, size, policy, heads, dim, options, in_tiles
):
    """By ratio: at most twice the reference's own error in bfloat16; NaN beside."""
    lengths = [(1, 130), (9, 9), (3, 3), (37, 181), (21, 37), (70, 701)]
    step = Step(lengths, policy, heads, layout, size, dim, **options)
    assert step.in_tiles == [False, True]
    eps = torch.finfo(BF16).eps
    floor = 4 * eps * max(1.0, step.want.abs().max().item())
    limit = 2 * (step.low - step.want).abs().max().item() + floor
    assert (step.out.double() - step.want).abs().max() <= limit
    # Decode and the prompt's few are multiplied as ever.
    rounding = eps * step.want[:1].abs() / 2
    assert ((step.out[:1].double() - step.want[:1]).abs() <= rounding + 2e-5).all()


@vectors_of_16
@pytest.mark.parametrize("layout, size", [(layouts.OWN, 16), (layouts.TILED, 32)])
@pytest.mark.parametrize("is_value", [False, True])
def test_nan_stays_nan(layout, size, is_value, in_tiles):
    """Of a token's key: in the queries that see it. Of its value: in those at least."""
    at = 180

    def poison(pages, table):
        offset = at % size + size * is_value
        pages[table[0, at // size], :, offset, 5] = float("nan")

    sees = torch.arange(160, 260)
    sees = (sees >= at) & (sees < at + 40)
    step = Step([(100, 260)], (4, 40), (6, 2), layout, size, 64, poison)
    assert torch.equal(step.want.isnan().any(2).all(1), sees)
    if is_value:
        assert step.out[sees][..., 5].isnan().all()
        assert not step.out[..., :5].isnan().any()
    else:
        assert torch.equal(step.out.isnan().all(2).all(1), sees)
        assert not step.out[~sees].isnan().any()


@vectors_of_16
@pytest.mark.skipif(platform.machine() != "x86_64", reason="vLLM's writer of tiles")
@pytest.mark.parametrize("borrows", [False, pytest.param(True, marks=with_amx)])
def test_a_stream_in_tiles_in_reused_blocks(borrows, in_tiles):
    """Chunks below, across and past S + W, in tiles that vLLM's operator wrote."""
    tests.test_streams_over_the_budget_in_reused_blocks("amx", BF16, 64, borrows)


@pytest.mark.parametrize(
    "change, kind",
    [
        ({}, amx.AMX),
        (dict(wish="never"), amx.NONE),
        (dict(wish="emulated", features=set()), amx.EMULATED),
        (dict(features={"amx-tile", "amx-int8"}), amx.NONE),
        (dict(granted=False), amx.NONE),
        (dict(lanes=8), amx.NONE),
        (dict(cache_dtype=torch.float32), amx.NONE),
        (dict(q_dtype=torch.float16), amx.NONE),
        (dict(layout=layouts.PLAIN), amx.NONE),
        (dict(layout=layouts.TILED), amx.AMX),
        (dict(block_size=24), amx.NONE),
        (dict(head_size=80), amx.NONE),
    ],
)
def test_where_tiles_are_used(change, kind, monkeypatch):
    found = dict(
        cache_dtype=BF16,
        q_dtype=BF16,
        layout=layouts.OWN,
        block_size=16,
        head_size=64,
        wish="",
        features={"amx-tile", "amx-bf16", "avx512f"},
        granted=True,
        lanes=16,
    )
    found |= change
    monkeypatch.setenv(amx_check.VARIABLE, found.pop("wish"))
    monkeypatch.setattr(amx_check, "FEATURES", found.pop("features"))
    granted = found.pop("granted")
    monkeypatch.setattr(amx_check, "is_granted", lambda: granted)
    monkeypatch.setattr(amx_check, "LANES", found.pop("lanes"))
    assert amx_check.possible.__wrapped__(**found) == kind


@vectors_of_16
@pytest.mark.parametrize("layout", [layouts.OWN, layouts.TILED])
def test_tiles_that_answer_wrong_are_not_used(layout, monkeypatch):
    """The step of the check ends within tiles; a sum of one token less is found."""
    find = amx_check.find_fault.__wrapped__
    sizes = 32, 64
    assert find(amx.NONE, layout, *sizes) is None
    assert find(KIND, layout, *sizes) is None
    run = flash.attend_tiles

    def forgets(q, caches, tiles, out, **options):
        if options["in_tiles"]:
            row, count, request, position = tiles.tiles[0].tolist()
            tiles.tiles[0] = row, count - 1, request, position
        run(q, caches, tiles, out, **options)

    monkeypatch.setattr(flash, "attend_tiles", forgets)
    assert "differ by inf" in find(KIND, layout, *sizes)


def test_the_log_says_whether_tiles_are_used(monkeypatch):
    spec = SimpleNamespace(dtype=BF16, block_size=32, head_size=64)
    compiled, said = [], []
    monkeypatch.setattr(cpu, "_compile_loops", lambda *x: compiled.append(x[2:]))
    for level in ("info_once", "warning_once"):
        monkeypatch.setattr(cpu.logger, level, lambda line, *x: said.append(line % x))
    for kind, fault in [
        (amx.NONE, None),
        (amx.AMX, None),
        (amx.AMX, "they differ by 1.0e+00, above 3.1e-02"),
    ]:
        monkeypatch.setattr(amx_check, "possible", lambda *x, kind=kind: kind)
        monkeypatch.setattr(amx_check, "find_fault", lambda *x, fault=fault: fault)
        cpu._start_loops(spec, BF16, layouts.TILED)
        right = amx.NONE if fault else kind
        assert amx_check.chosen.__wrapped__(BF16, BF16, 0, 32, 64) == right
    tiled = (layouts.TILED, amx.AMX)
    assert compiled == [(layouts.TILED, amx.NONE), tiled, tiled, (layouts.TILED,)]
    assert said == [
        "Prompts are multiplied in AMX's tiles.",
        "Prompts are multiplied without AMX's tiles: they differ by 1.0e+00, above "
        "3.1e-02.",
    ]


@vectors_of_16
@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86's tiles")
@pytest.mark.parametrize("layout", [layouts.OWN, layouts.TILED])
def test_products_compile_for_a_cpu_with_amx(layout):
    """AMX's products are there, no tile is kept on the stack, and none stays ours."""
    module = ir.Module()
    module.triple = llvm.get_process_triple()

    def step(builder, saved, *arguments):
        tiles = amx.Amx(builder)
        tiles.begin(saved)
        amx._call_product(builder, amx.AMX, False, *arguments)
        values = made_function(module, "values", 12, amx._values(amx.AMX, layout))
        builder.call(values, arguments[:12])
        tiles.end(saved)

    made_function(module, "step", 14, step).linkage = "external"
    cpu_with_amx = llvm.Target.from_default_triple().create_target_machine(
        cpu="sapphirerapids", features="+amx-tile,+amx-bf16", opt=3
    )
    code = llvm.parse_assembly(str(module))
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    passes = llvm.create_pass_builder(cpu_with_amx, options)
    passes.getModulePassManager().run(code, passes)
    text = cpu_with_amx.emit_assembly(code)
    operations = re.findall(r"\t(tdp\w+|tile\w+|ldtilecfg|sttilecfg)\t(.*)", text)
    names = [name for name, _ in operations]
    # Of either product 4 + 2 + 2 + 1 tiles at the least.
    assert names.count("tdpbf16ps") >= 18 and names.count("tilestored") == 18
    assert {"tilezero", "tileloadd"} <= set(names)
    assert names.count("sttilecfg") == 1 and names.count("ldtilecfg") == 2
    stored = [x for name, x in operations if name == "tilestored"]
    assert not any("(%rsp" in x for x in stored), stored
