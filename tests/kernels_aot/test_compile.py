"""The shipped kernels compile for every target within what the target has.

The default is a case or two for each target; ``KERNELS_AOT=all`` compiles every
shipped configuration, as the table in benchmarks/results does (about 12 minutes on
one core the first time, seconds from Triton's cache).
"""

import csv
import itertools
import os
from pathlib import Path

import pytest
import triton
from vllm_sink_kernels.triton import cache_write, merge, plan, window

from tests.kernels_aot.compile_kernels import (
    LOOP_INSTRUCTIONS,
    TARGETS,
    Case,
    argument_types,
    compile_case,
    counts_instructions,
    cuobjdump,
    problems,
    shipped_cases,
    source,
    tiles_ahead_wanted,
    variant_of,
)

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "benchmarks/results/kernel_resources.csv"
ALL = os.environ.get("KERNELS_AOT") == "all"


def cases() -> list[Case]:
    if ALL:
        return shipped_cases()
    chosen = [
        Case(kernel, target, 128, (32, 8), (4, 4092))
        for kernel in ("decode", "prefill")
        for target in TARGETS
    ]
    chosen.append(Case("decode", "sm_90", 128, (32, 8), (4, 4092), mixed=True))
    chosen.append(Case("decode", "sm_90", 128, (32, 8), (4, 4092), "fp32", "fp32"))
    chosen.append(Case("decode", "sm_80", 256, (32, 8), (4, 4092), "fp32", "fp32"))
    assert set(chosen) <= set(shipped_cases())
    return chosen


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_compiles_within_the_target(case):
    _, resources = compile_case(case)
    assert not problems(case, resources), resources


def test_the_table_holds_every_shipped_case_and_none_fails():
    with TABLE.open() as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == len(shipped_cases())
    for case, row in zip(shipped_cases(), rows, strict=True):
        assert (row["kernel"], row["target"]) == (case.kernel, case.target)
        assert row["spills"] == row["stack"] == "0", row
        assert int(row["shared"]) <= TARGETS[case.target][1]
        assert int(row["tiles_ahead"]) >= tiles_ahead_wanted(case), row
        assert int(row["wait"]) >= 2 or row["wait"] == "-1", row
        if counts_instructions(case):
            assert 0 < int(row["loop_instructions"]) <= LOOP_INSTRUCTIONS, row
        if case.dtype == "bf16":
            assert int(row["matrix_instructions"]) > 0, row


def compile_small(kernel, target, constants, types):
    return triton.compile(source(kernel, constants, types), target=TARGETS[target][0])


def test_hoppers_sinks_after_the_window_compile():
    case = Case("prefill", "sm_90", 128, (32, 8), (4, 4092))
    constants = window.kernel_constants(variant_of(case), window.ADD_SINKS)
    compiled = triton.compile(
        source(window.add_sinks_kernel, constants, argument_types(case)),
        target=TARGETS["sm_90"][0],
        options={"num_warps": window.ADD_SINKS.num_warps},
    )
    report = cuobjdump("--dump-resource-usage", compiled.asm["cubin"])
    assert "STACK:0 " in report and "LOCAL:0 " in report, report
    types = {"first_request": "i32"} | dict.fromkeys(
        ("block_table_ptr", "query_start_ptr", "seq_lens_ptr"), "*i32"
    )
    types |= dict.fromkeys(("out_table_ptr", "out_start_ptr", "out_lens_ptr"), "*i32")
    constants = {"BLOCK_SIZE": 16, "BLOCK": window.BLOCK}
    compile_small(window.window_view_kernel, "sm_90", constants, types)


@pytest.mark.parametrize("target", TARGETS)
def test_the_small_kernels_compile(target):
    constants = {"NUM_HEADS": 32, "HEAD_SIZE": 128, "SPLITS": 64, "BLOCK_D": 128}
    types = {"part_ptr": "*fp32", "lse_ptr": "*fp32", "positions_ptr": "*i32"}
    types["out_ptr"] = "*bf16"
    compile_small(merge.merge_splits_kernel, target, constants, types)
    fp8 = {"gfx942": ("*fp8e4b8", 240.0), "sm_80": ("*bf16", 0.0)}
    quantized = fp8.get(target, ("*fp8e4nv", 448.0))
    types = {"query_start_ptr": "*i32", "seq_lens_ptr": "*i32"}
    types |= {"positions_ptr": "*i32", "requests_ptr": "*i32"}
    compile_small(plan.map_tokens_kernel, target, {"BLOCK": plan.BLOCK}, types)
    for (cache, top), mixed in itertools.product(
        {("*bf16", 0.0), quantized}, (False, True)
    ):
        constants = {
            "NUM_KV_HEADS": 8,
            "HEAD_SIZE": 128,
            "BLOCK_SIZE": 16,
            "FP8_MAX": top,
            "K_SCALE_TENSOR": True,
            "V_SCALE_TENSOR": False,
            "ALIGNMENT": 16 * mixed,
            "BLOCK_H": 8,
            "BLOCK_D": 128,
        }
        types = {"k_ptr": "*bf16", "v_ptr": "*bf16", "slots_ptr": "*i64"}
        types["heads_ptr"] = "*i64" if mixed else None
        types |= {"k_strides": ("i32",) * 2, "v_strides": ("i32",) * 2}
        types |= {"k_cache_strides": ("i32",) * 3, "v_cache_strides": ("i32",) * 3}
        types |= {"k_cache_ptr": cache, "v_cache_ptr": cache}
        types |= {"k_scale": "*fp32", "v_scale": "fp32"}
        compile_small(cache_write.write_kv_cache_kernel, target, constants, types)
