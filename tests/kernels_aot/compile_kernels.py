"""Compile the shipped kernels ahead of time and report what they use.

No GPU is needed: Triton compiles for a named target, and the ``cuobjdump`` that it
bundles reads the resources out of the binary. The tests compile the same cases and
judge them. The table of every case::

    python -m tests.kernels_aot.compile_kernels \\
        --csv benchmarks/results/kernel_resources.csv
"""

import argparse
import csv
import itertools
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vllm_sink_kernels.triton import decode, launch_config, prefill
from vllm_sink_kernels.triton.arguments import Variant
from vllm_sink_kernels.triton.primitives import ALIKE, APART, PACKED, Scores
from vllm_sink_kernels.triton.turn import Turn

# target -> (Triton's target, shared memory of a block in bytes, and of a core,
# registers of a core in 32-bit words, warps of a core)
KIB = 1024
TARGETS: dict[str, tuple[GPUTarget, int, int, int, int]] = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB, 164 * KIB, 65536, 64),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB, 228 * KIB, 65536, 64),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB, 228 * KIB, 65536, 64),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * KIB, 100 * KIB, 65536, 48),
    # 4 SIMDs, each with 512 vector registers for each of 64 lanes and 8 waves
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB, 64 * KIB, 512, 32),
    "gfx950": (GPUTarget("hip", "gfx950", 64), 160 * KIB, 160 * KIB, 512, 32),
}
MATRIX = {"cuda": r"mma\.sync|wgmma|tcgen05\.mma", "hip": r"v_mfma"}
INSTRUCTION = {"cuda": r"\n\s+[@a-z].*;", "hip": r"\n\t[vsdb]\w*_\w+"}
# A matrix product in machine code, a label, a jump to one.
PRODUCT = {"cuda": r"HGMMA|HMMA|UTC\w*MMA", "hip": r"v_mfma"}
LAYOUTS = {"packed": int(PACKED), "alike": int(ALIKE), "apart": int(APART)}
LITTLE_ROOM = ("fp32", "gfx942", 256)
# Hopper's prefill at head size 128, bf16: what a warp may issue for 128 keys.
LOOP_INSTRUCTIONS = 650


@dataclass(frozen=True)
class Case:
    """One kernel for one target: ``kv`` is bf16 or fp8."""

    kernel: str
    target: str
    head_size: int
    heads: tuple[int, int]
    budget: tuple[int, int]
    kv: str = "bf16"
    dtype: str = "bf16"
    is_neox: bool = True
    soft_cap: bool = False
    sink_logits: bool = False
    mixed: bool = False  # KV heads with caches and policies of their own
    layout: str = "packed"  # of K and V

    @property
    def name(self) -> str:
        extra = "-interleaved" * (not self.is_neox) + "-cap" * self.soft_cap
        extra += "-logits" * self.sink_logits + "-mixed" * self.mixed
        extra += f"-{self.layout}" * (self.layout != "packed")
        heads = "x".join(map(str, self.heads))
        budget = "+".join(map(str, self.budget))
        kv = self.kv if self.dtype == "bf16" else self.dtype
        return (
            f"{self.kernel}-{self.target}-d{self.head_size}-{heads}-{budget}-{kv}"
            + extra
        )


@dataclass
class Resources:
    """What the binary of a case uses."""

    registers: int  # a thread; vector registers on hip
    spills: int  # bytes on cuda, registers on hip
    stack: int  # bytes a thread
    shared: int  # bytes a block
    matrix_instructions: int
    warps: int
    stages: int
    block_n: int
    tiles_ahead: int  # how many tiles before its use K and V are asked for
    wait: int  # copies in flight that a loop's wait leaves; -1: it has none
    instructions: int  # lines of PTX or of AMD's assembler
    loop_instructions: int  # of machine code a warp for 128 keys of the window; -1 fp32
    occupancy: float  # share of the core's warps, by registers and shared memory


def shipped_cases() -> list[Case]:
    """Every row of the tables (head sizes, groups, budgets) on every target."""
    cases = []
    for kernel, target in itertools.product(("decode", "prefill"), TARGETS):
        for head_size in (64, 80, 128, 256):  # 80 is padded as 96 is
            cases.append(Case(kernel, target, head_size, (32, 8), (4, 4092)))
        if (kernel, target) == ("decode", "sm_120"):  # a row of small budgets
            cases.append(Case(kernel, target, 64, (9, 3), (4, 508)))
        if target == "sm_90":
            cases.append(Case(kernel, target, 128, (8, 8), (64, 960)))
        cases.append(Case(kernel, target, 128, (5, 1), (0, 4096)))
        cases.append(Case(kernel, target, 64, (64, 8), (4, 4092), sink_logits=True))
        cases.append(Case(kernel, target, 256, (16, 8), (4, 4092), soft_cap=True))
        cases.append(Case(kernel, target, 128, (32, 8), (4, 4092), is_neox=False))
        if target not in ("sm_80", "gfx942"):  # no e4m3fn there
            cases.append(Case(kernel, target, 128, (32, 8), (4, 4092), kv="fp8"))
        for head_size in (128, 256):
            cases.append(
                Case(kernel, target, head_size, (32, 8), (4, 4092), "fp32", "fp32")
            )
        cases.append(Case(kernel, target, 128, (32, 8), (4, 4092), mixed=True))
    for layout in ("alike", "apart"):
        cases.append(Case("prefill", "sm_90", 128, (32, 8), (4, 4092), layout=layout))
    return cases


def variant_of(case: Case) -> Variant:
    """The layer of a case, in blocks of 16."""
    num_heads, num_kv_heads = case.heads
    return Variant(
        num_heads=num_heads,
        group=num_heads // num_kv_heads,
        head_size=case.head_size,
        block_size=16,
        rot_dim=case.head_size,
        is_neox=case.is_neox,
        has_sinks=case.budget[0] > 0,
        k_scale_tensor=case.kv == "fp8",
        v_scale_tensor=case.kv == "fp8",
        alignment=16 if case.mixed else 0,
        layout=LAYOUTS["alike" if case.kv != "bf16" else case.layout],
    )


def compile_case(case: Case) -> tuple[Any, Resources]:
    """Compile ``case`` with the configuration that the launcher would pick."""
    variant = variant_of(case)
    table = launch_config.DECODE if case.kernel == "decode" else launch_config.PREFILL
    config = launch_config.lookup(
        table,
        case.target,
        head_size=case.head_size,
        group=variant.group,
        budget=sum(case.budget),
        dtype=torch.float32 if case.dtype == "fp32" else torch.bfloat16,
    )
    if case.kernel == "decode" and case.kv == "fp8":
        config = launch_config.halve_keys(config)
    if case.kernel == "prefill" and case.kv == "fp8":
        config = launch_config.prefill_fp8(config)
    if case.kernel == "decode":
        fn = decode.sink_decode_kernel
        constants = decode.kernel_constants(variant, config)
    else:
        fn = prefill.sink_prefill_kernel
        constants = prefill.kernel_constants(variant, config)
    compiled = triton.compile(
        source(fn, constants, argument_types(case)),
        target=TARGETS[case.target][0],
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    read = hip_resources if case.target.startswith("gfx") else cuda_resources
    return compiled, read(case, compiled, config)


def argument_types(case: Case) -> dict[str, Any]:
    """The types of the launcher's arguments, in tuples as they are; absent is None."""
    kv = {"fp8": "*fp8e4nv", "bf16": "*bf16", "fp32": "*fp32"}[case.kv]
    dtype, i32 = f"*{case.dtype}", "i32"
    kv_scale = "*fp32" if case.kv == "fp8" else "fp32"
    ints = ("block_table", "positions", "requests", "query_start", "seq_lens")
    return {f"{name}_ptr": "*i32" for name in ints} | {
        "q_ptr": dtype,
        "k_ptr": kv,
        "v_ptr": kv,
        "out_ptr": dtype,
        "heads_ptr": "*i64" if case.mixed else None,
        "part_ptr": "*fp32",
        "lse_ptr": "*fp32",
        "q_strides": (i32,) * 2,
        "k_strides": (i32,) * 3,
        "v_strides": (i32,) * 3,
        "out_strides": (i32,) * 2,
        "scores": Scores(
            "fp32",
            "fp32" if case.soft_cap else None,
            dtype if case.sink_logits else None,
            kv_scale,
            kv_scale,
        ),
        "turn": Turn(dtype, i32, i32) if case.budget[0] else None,
        "policy": (i32,) * 2,
    }


def source(fn: Any, constants: dict[str, Any], types: dict[str, Any]) -> ASTSource:
    """``fn`` with arguments of ``types``, int32 the rest, aligned as real ones are."""
    values, signature, attrs = dict(constants), {}, {}

    def place(path: tuple[int, ...], name: str, given: Any) -> Any:
        """The type of an argument, or of a tuple's member."""
        if isinstance(given, tuple):
            fields = getattr(given, "_fields", (name,) * len(given))
            members = zip(range(len(given)), fields, given, strict=True)
            return tuple([place((*path, j), *member) for j, *member in members])
        if given is None:
            values[path] = None
            return "constexpr"
        param = fn.params[path[0]]
        if given.startswith("*"):
            is_aligned = not param.do_not_specialize_on_alignment
        else:
            is_aligned = "stride" in name and not param.do_not_specialize
        if is_aligned:
            attrs[path] = [["tt.divisibility", 16]]
        return given

    for i, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        given = types.get(name, "i32")
        signature[name] = place((i,), name, given)
        if hasattr(given, "_make"):  # members are read by their names
            signature[name] = given._make(signature[name])
    return ASTSource(fn, signature, values, attrs)


DOT = re.compile(r"tt\.dot |warp_group_dot |tc_gen5_mma ")
# A tile of K or V on its way before the loop: a copy to shared memory, or on gfx942
# a load to registers (of which only those of the pipeline are of interest).
TILE_LOAD = re.compile(
    r"async_copy_global_to_local .*tensor<\d+x\d+x!|"
    r'(?:tt\.load|buffer_load) .*"prologue".*tensor<\d+x\d+x'
)


def pipeline(ttgir: str) -> tuple[int, int]:
    """Tiles that the loops over keys load ahead, and what their waits leave in flight.

    A loop that loads n tiles ahead is preceded by n loads of K and n of V; of two such
    loops the worse counts.

    Returns:
        tiles ahead; the smallest ``num`` of a wait within a loop, -1 without any.
    """
    ahead, waits, loads, body = [], [], 0, None
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        if body is None:
            loads += bool(TILE_LOAD.search(line))
            if "scf.for" in line:
                body, body_indent = [], indent
        elif indent <= body_indent and line.strip().startswith("}"):
            if any(DOT.search(x) for x in body):
                ahead.append(loads // 2)
                found = (re.search(r"async_wait .*num = (\d+)", x) for x in body)
                waits += [int(wait[1]) for wait in found if wait]
            body, loads = None, 0
        else:
            body.append(line)
    assert ahead, "no loop with a matrix product"
    return min(ahead), min(waits, default=-1)


def sass_loops(text: str) -> list[list[str]]:
    """Instructions from the target of each backward jump to the jump."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)
    code = [instruction for _, instruction in lines]
    at = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    found = []
    for i, instruction in enumerate(code):
        jump = re.search(r"BRA.*?(0x[0-9a-f]+)", instruction)
        if jump and at.get(int(jump[1], 16), len(code)) <= i:
            found.append(code[at[int(jump[1], 16)] : i + 1])
    return found


def amd_loops(text: str) -> list[list[str]]:
    """As ``sass_loops``, of AMD's assembler."""
    code: list[str] = []
    at: dict[str, int] = {}
    found = []
    for line in text.splitlines():
        label = re.match(r"(\.LBB\w+):", line)
        if label:
            at[label[1]] = len(code)
        elif re.match(r"\t[vsdb]\w*_\w+", line):
            code.append(line)
            jump = re.search(r"s_c?branch\w*\s+(\.LBB\w+)", line)
            if jump and jump[1] in at:
                found.append(code[at[jump[1]] :])
    return found


def loop_instructions(
    case: Case, loops: list[list[str]], product: str, config: Any
) -> int:
    """Of the loop over the window, a warp, for 128 keys: in prefill the unmasked one.

    It is the last loop with matrix products of decode, the last but one of prefill,
    where a masked edge follows. Those are longer: were their order another, the count
    would be above what is allowed, not below.
    """
    if case.dtype == "fp32":
        return -1
    loops = [x for x in loops if any(re.search(product, line) for line in x)]
    loop = loops[-1 if case.kernel == "decode" else -2]
    return round(len(loop) * 128 / config.block_n)


def cuobjdump(option: str, binary: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(binary)
        f.flush()
        command = [tool, option, f.name]
        return subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout


def cuda_resources(case: Case, compiled: Any, config: Any) -> Resources:
    report = cuobjdump("--dump-resource-usage", compiled.asm["cubin"])
    usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    _, _, core_shared, core_registers, core_warps = TARGETS[case.target]
    shared, registers = compiled.metadata.shared, usage["REG"]
    # Registers go to warps in units of 256, 1 KiB of shared memory a block is taken.
    warp_registers = -(-registers * 32 // 256) * 256
    blocks = min(
        core_registers // (warp_registers * config.num_warps),
        core_shared // (shared + KIB),
        core_warps // config.num_warps,
    )
    tiles_ahead, wait = pipeline(compiled.asm["ttgir"])
    return Resources(
        registers=registers,
        spills=usage["LOCAL"],
        stack=usage["STACK"],
        shared=shared,
        matrix_instructions=len(re.findall(MATRIX["cuda"], compiled.asm["ptx"])),
        warps=config.num_warps,
        stages=config.num_stages,
        block_n=config.block_n,
        tiles_ahead=tiles_ahead,
        wait=wait,
        instructions=len(re.findall(INSTRUCTION["cuda"], compiled.asm["ptx"])),
        loop_instructions=loop_instructions(
            case,
            sass_loops(cuobjdump("-sass", compiled.asm["cubin"])),
            PRODUCT["cuda"],
            config,
        ),
        occupancy=round(blocks * config.num_warps / core_warps, 3),
    )


def hip_resources(case: Case, compiled: Any, config: Any) -> Resources:
    asm = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", asm)
        assert found is not None, f"{name} missing from the machine code"
        return int(found[1])

    registers = field("vgpr_count")
    _, _, core_shared, simd_registers, core_warps = TARGETS[case.target]
    waves = min(8, simd_registers // (-(-registers // 8) * 8)) * 4
    shared = compiled.metadata.shared
    blocks = min(waves // config.num_warps, core_shared // max(shared, 1))
    tiles_ahead, wait = pipeline(compiled.asm["ttgir"])
    return Resources(
        registers=registers,
        # Scalar registers spill into lanes of a vector register, not to memory.
        spills=field("vgpr_spill_count"),
        stack=field("private_segment_fixed_size"),
        shared=shared,
        matrix_instructions=len(re.findall(MATRIX["hip"], asm)),
        warps=config.num_warps,
        stages=config.num_stages,
        block_n=config.block_n,
        tiles_ahead=tiles_ahead,
        wait=wait,
        instructions=len(re.findall(INSTRUCTION["hip"], asm)),
        loop_instructions=loop_instructions(
            case, amd_loops(asm), PRODUCT["hip"], config
        ),
        occupancy=round(blocks * config.num_warps / core_warps, 3),
    )


def tiles_ahead_wanted(case: Case) -> int:
    """Two; one where shared memory has no room for two (see ``launch_config``)."""
    return 1 if (case.dtype, case.target, case.head_size) == LITTLE_ROOM else 2


def counts_instructions(case: Case) -> bool:
    """Whether ``LOOP_INSTRUCTIONS`` holds for the case."""
    kind = case.kernel, case.target, case.head_size, case.kv
    return kind == ("prefill", "sm_90", 128, "bf16") and case.layout == "packed"


def problems(case: Case, r: Resources) -> list[str]:
    """Why the case must not ship, if it must not."""
    found = []
    if r.spills or r.stack:
        found.append(f"spills {r.spills}, stack frame {r.stack}: want none")
    limit = TARGETS[case.target][1]
    if r.shared > limit:
        found.append(f"shared memory {r.shared} above the target's {limit}")
    if case.dtype != "fp32" and not r.matrix_instructions:
        found.append("no matrix instruction")
    want = tiles_ahead_wanted(case)
    if r.tiles_ahead < want:
        found.append(f"K and V loaded {r.tiles_ahead} tiles ahead: want {want}")
    if 0 <= r.wait < 2:
        found.append(f"a loop's wait leaves {r.wait} copies in flight: want a tile's 2")
    if counts_instructions(case) and not 0 < r.loop_instructions <= LOOP_INSTRUCTIONS:
        found.append(
            f"{r.loop_instructions} instructions for 128 keys: want "
            f"{LOOP_INSTRUCTIONS} at most"
        )
    if r.occupancy == 0:
        found.append("not one block fits a core")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, help="write the table there")
    parser.add_argument("--only", default="", help="regex of case names")
    args = parser.parse_args()
    rows, failed = [], 0
    for case in shipped_cases():
        if not re.search(args.only, case.name):
            continue
        _, resources = compile_case(case)
        found = problems(case, resources)
        failed += bool(found)
        print(case.name, asdict(resources), *found, flush=True)
        shape = {
            "kernel": case.kernel,
            "target": case.target,
            "head_size": case.head_size,
            "query_heads": case.heads[0],
            "kv_heads": case.heads[1],
            "num_sink_tokens": case.budget[0],
            "window_size": case.budget[1],
            "dtype": case.dtype,
            "kv_dtype": case.kv,
            "variant": "mixed"
            if case.mixed
            else case.layout
            if case.layout != "packed"
            else "soft_cap"
            if case.soft_cap
            else "sink_logits"
            if case.sink_logits
            else "neox"
            if case.is_neox
            else "interleaved",
            "triton": triton.__version__,
        }
        rows.append(shape | asdict(resources))
    if args.csv and rows:
        with args.csv.open("w", newline="") as f:
            writer = csv.DictWriter(f, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print(f"{len(rows)} cases, {failed} to mend")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
