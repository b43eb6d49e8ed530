"""AMX's own instructions, on any x86 CPU: those that it lacks are trapped and emulated.

``tests/helpers/amx_traps.c`` does what the instruction set's reference says, so what
runs is the code that runs where there is AMX: our loops', and vLLM's kernel's.
"""

import os
import platform
import shutil
import subprocess
import sys
from ctypes import CDLL, c_long, create_string_buffer
from pathlib import Path

import llvmlite.binding
import pytest
import torch
from vllm_sink_kernels.cpu import amx, amx_check, native

from tests.helpers.engine import prompt_logprobs, sink_engine
from vllm_sink.attention import cpu_stock

COMPILER = shutil.which("cc") or shutil.which("gcc")
ROOT = Path(__file__).parents[2]
HAS_AMX = {"amx-tile", "amx-bf16"} <= native.FEATURES and amx_check.is_granted()
NAMES = ("test_cpu_tiles.py", "test_cpu_stock.py", Path(__file__).name)
# Of the tests for every layout and option: one of each, with AMX.
CHOSEN = " or ".join(
    [
        "(equal_the_reference and heads0)",
        "nan_stays",
        "(in_reused and not vec)",
        "answer_wrong",
        "engine_with_amx",
        "as_they_were",
    ]
)


EMULATOR = CDLL(None)
IS_EMULATED = hasattr(EMULATOR, "amx_products")


def emulated_products() -> int:
    """How many tiles the emulator multiplied."""
    return c_long.in_dll(EMULATOR, "amx_products").value if IS_EMULATED else 0


@pytest.mark.skipif(HAS_AMX, reason="this CPU has AMX: the tests run on it as they are")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86's instructions")
@pytest.mark.skipif(native.LANES != 16, reason="tiles of 16 need vectors of 16")
@pytest.mark.skipif(COMPILER is None, reason="the emulator is C")
def test_amx_instructions_emulated(tmp_path):
    library = tmp_path / "amx_traps.so"
    source = ROOT / "tests/helpers/amx_traps.c"
    options = ["-O3", "-mavx2", "-mfma", "-Wall", "-Wextra", "-Werror"]
    build = [COMPILER, *options, "-shared", "-fPIC", "-o", library, source, "-ldl"]
    subprocess.run(build, check=True)
    features = llvmlite.binding.get_host_cpu_features()
    features.update({"amx-tile": True, "amx-bf16": True})
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "NUMBA_CPU_FEATURES": features.flatten(),
    }
    tests = [ROOT / "tests/attention" / name for name in NAMES]
    # pytest's handler of faults would take the signal.
    command = [sys.executable, "-m", "pytest", "-p", "no:faulthandler", "-q", "-rs"]
    result = subprocess.run(
        [*command, "-k", CHOSEN, *tests],
        env=environment,
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@pytest.mark.skipif(not HAS_AMX, reason="of test_amx_instructions_emulated")
def test_an_engine_with_amx(model_path, prose, reference, monkeypatch):
    """Both ways in one engine, as a user's starts it; as exact as without AMX."""
    # PyTorch asks the CPU itself.
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    prompts = [prose[:230], prose[5000:5064], prose[9000:9003]]
    options = dict(block_size=32, max_num_batched_tokens=96, max_model_len=512)
    measured, products = {}, []
    for wish, isa in {"": "amx", "never": None}.items():
        monkeypatch.setenv(cpu_stock.VARIABLE, wish)
        monkeypatch.setenv(amx_check.VARIABLE, wish)
        amx_check.possible.cache_clear()
        amx_check.chosen.cache_clear()
        with sink_engine(model_path, 4, 60, dtype="bfloat16", **options) as llm:
            impls = llm.apply_model(
                lambda model: [x.impl for x in model.modules() if hasattr(x, "impl")]
            )[0]
            assert impls and {getattr(x.stock, "isa", None) for x in impls} == {isa}
            layout = impls[0].stock.layout if isa else 0
            kind = amx_check.chosen(torch.bfloat16, torch.bfloat16, layout, 32, 64)
            assert kind == (amx.AMX if isa else amx.NONE)
            before = emulated_products()
            measured[wish] = prompt_logprobs(llm, prompts)
            products.append(emulated_products() - before)
    if IS_EMULATED:
        assert products[0] > 10_000 and products[1] == 0, products
    for tokens, got, plain in zip(
        prompts, measured[""], measured["never"], strict=True
    ):
        want = reference.logprobs(tokens, 4, 60, "cache")
        error, limit = (got - want).abs().mean(), (plain - want).abs().mean()
        assert error <= 1.25 * limit, (error, limit)


@pytest.mark.skipif(not IS_EMULATED, reason="of test_amx_instructions_emulated")
def test_tiles_are_configured_as_they_were():
    """A loop gives back what another kernel configured in its thread."""
    small = bytes([1, *[0] * 15, *[8, 0] * 8, *[0] * 16, *[2] * 8]) + bytes(8)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for configuration in (small, bytes(64)):
            EMULATOR.amx_configure(configuration)
            before = emulated_products()
            assert amx_check.find_fault.__wrapped__(amx.AMX, 0, 32, 64) is None
            assert emulated_products() > before
            found = create_string_buffer(64)
            EMULATOR.amx_configuration(found)
            assert found.raw == configuration
    finally:
        torch.set_num_threads(threads)
