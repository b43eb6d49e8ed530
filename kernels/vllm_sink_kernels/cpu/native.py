"""Compiled loops over torch's memory, run by torch's own threads.

A loop is a C function of one argument, the address of a :class:`Job`: sizes and
addresses. Every thread of the team calls it with the same job and takes items
off the job's counter until none is left, so a thread that wakes late costs
nothing but its own share.

Numba compiles the loops but does not start them. Its OpenMP layer resolves
``libgomp.so.1`` to the system's library, torch and vLLM's C++ operators to the
one in torch's wheel: two pools of threads on the same cores, and the pool that
slept (or, spinning, held the core the other wanted) has to be woken in every
layer. :func:`run` starts the loop in torch's pool, through the entry point that
compilers use for ``#pragma omp parallel``; LLVM's and Intel's runtimes have it too.
Its array arguments, besides, cost Numba's dispatcher more than a small loop takes.
"""

from __future__ import annotations

import ctypes
import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, config, types
from numba.extending import intrinsic

from vllm_sink_kernels.cpu.disk_cache import cache_folder, locked

# Where compiled loops are kept; None: nowhere.
FOLDER = cache_folder()
# No "nnan"/"ninf": a NaN must stay one, and -inf is the empty maximum.
OPTIONS: dict[str, Any] = {
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
    "error_model": "numpy",
}


def _cpu_features() -> frozenset[str]:
    """What Numba compiles for; NUMBA_CPU_FEATURES restricts it."""
    if config.CPU_FEATURES is not None:
        text = config.CPU_FEATURES
    else:
        text = llvmlite.binding.get_host_cpu_features().flatten()
    return frozenset(x[1:] for x in text.split(",") if x.startswith("+"))


FEATURES = _cpu_features()
CPU_NAME = config.CPU_NAME or llvmlite.binding.get_host_cpu_name()
# Floats of a vector.
LANES = 16 if "avx512f" in FEATURES else 8
# Numba's cache of a loop knows the loop's own file and what its closure holds, not
# the functions that it calls: each loop's closure holds this digest of all files.
VERSION = zlib.crc32(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
)
# Numba has no 16-bit floats: their bits travel as integers of two types.
STORAGE: dict[torch.dtype, np.dtype] = {
    torch.float32: np.dtype(np.float32),
    torch.bfloat16: np.dtype(np.uint16),
    torch.float16: np.dtype(np.int16),
}


def job_type(name: str, integers: str, floats: str) -> tuple[type, types.Type]:
    """A struct of named int64 and float64 fields, to Python and to Numba.

    Its first field is the counter that :func:`take` takes items from.

    Args:
        integers, floats: Names, separated by spaces. Addresses are integers.
    """
    fields: list[tuple[str, Any]] = [("next_item", ctypes.c_int64)]
    fields += [(field, ctypes.c_int64) for field in integers.split()]
    fields += [(field, ctypes.c_double) for field in floats.split()]
    struct = type(name, (ctypes.Structure,), {"_fields_": fields})
    record = numba.from_dtype(np.dtype(struct))
    return struct, types.void(types.CPointer(record))


def compiled(signature: Any, name: str, *dtypes: torch.dtype) -> Callable:
    """Decorator: the loop over a job that Numba compiles, or finds in its cache.

    Its full name, and so its files in the cache, are the dtypes' and the CPU's alone.
    Numba writes an index back as it read it before and numbers the data files by it:
    of two processes that keep different loops under one name the second forgets the
    first's, or gives its number to the other's code.
    """
    machine = f"{CPU_NAME} {sorted(FEATURES)}"
    kinds = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    full_name = "_".join([name, *kinds, f"{zlib.crc32(machine.encode()):08x}"])

    def compile_loop(function: Callable) -> Any:
        function.__qualname__ = full_name
        with locked(FOLDER):
            return numba.cfunc(signature, cache=FOLDER is not None, **OPTIONS)(function)

    return compile_loop


def run(loop: Any, job: ctypes.Structure, num_threads: int) -> None:
    """Run a compiled loop to its end in ``num_threads`` threads, this one included.

    Args:
        loop: A ``numba.cfunc`` over the job's type.
    """
    job.next_item = 0  # type: ignore[attr-defined]
    parallel = _parallel()
    if num_threads == 1 or parallel is None:
        _serial(loop)(ctypes.byref(job))
    else:
        parallel(loop.address, ctypes.byref(job), num_threads, 0)


@functools.cache
def _serial(loop: Any) -> Callable:
    """The loop as Python calls it; Numba's ``loop.ctypes`` is made anew each time."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(loop.address)


@functools.cache
def _parallel() -> Callable | None:
    """OpenMP's "run this function in a team" of the runtime that torch loaded."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except AttributeError:  # another runtime: one thread
        return None
    function.restype = None
    function.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.c_uint,
    ]
    return function


@intrinsic
def take(typing_context, counter, count):
    """Add ``count`` to the int64 at ``counter``, return what it was; atomic.

    Args:
        counter: An address, or the pointer to a job.
    """

    def codegen(context, builder, signature, arguments):
        address, number = arguments
        pointer_type = ir.IntType(64).as_pointer()
        if isinstance(signature.args[0], types.CPointer):
            pointer = builder.bitcast(address, pointer_type)
        else:
            pointer = builder.inttoptr(address, pointer_type)
        return builder.atomic_rmw("add", pointer, number, "seq_cst")

    return types.int64(counter, types.int64), codegen


@intrinsic
def _void_pointer(typing_context, address):
    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@numba.njit(inline="always")
def array(address, shape, dtype):
    """The C-contiguous array at an address."""
    return numba.carray(_void_pointer(address), shape, dtype)


def _element(builder: Any, address: Any, index: Any, element: ir.Type) -> Any:
    """The pointer to element ``index`` of an array, in a form that LLVM vectorizes."""
    pointer = builder.inttoptr(address, element.as_pointer())
    return builder.gep(pointer, [index])


# What a number of storage is in memory; int32 and int64 stay what they are.
_STORED: dict[types.Type, ir.Type] = {
    types.float32: ir.FloatType(),
    types.uint16: ir.IntType(16),
    types.int16: ir.HalfType(),
    types.int32: ir.IntType(32),
    types.int64: ir.IntType(64),
}


@intrinsic
def at(typing_context, dtype, address, index):
    """Number ``index`` of the array at an address, float32 from any storage type."""
    kind = dtype.dtype
    result = kind if kind in (types.int32, types.int64) else types.float32

    def codegen(context, builder, signature, arguments):
        stored = _STORED[kind]
        place = _element(builder, arguments[1], arguments[2], stored)
        value = builder.load(place)
        if kind == types.uint16:  # bfloat16: the upper half of a float32
            bits = builder.zext(value, ir.IntType(32))
            bits = builder.shl(bits, ir.IntType(32)(16))
            return builder.bitcast(bits, ir.FloatType())
        if kind == types.int16:
            return builder.fpext(value, ir.FloatType())
        return value

    return result(dtype, types.int64, types.int64), codegen


@intrinsic
def put(typing_context, dtype, address, index, x):
    """Set number ``index`` to the float32, rounded to nearest even in storage."""
    kind = dtype.dtype

    def codegen(context, builder, signature, arguments):
        _, address, index, value = arguments
        i32 = ir.IntType(32)
        if kind == types.uint16:
            number = value
            bits = builder.bitcast(number, i32)
            odd = builder.and_(builder.lshr(bits, i32(16)), i32(1))
            up = builder.add(builder.add(bits, i32(0x7FFF)), odd)
            # A NaN's rounding could carry into the sign.
            is_number = builder.fcmp_ordered("ord", number, number)
            rounded = builder.select(is_number, builder.lshr(up, i32(16)), i32(0x7FC0))
            value = builder.trunc(rounded, ir.IntType(16))
        elif kind == types.int16:
            value = builder.fptrunc(value, ir.HalfType())
        builder.store(value, _element(builder, address, index, _STORED[kind]))
        return context.get_dummy_value()

    return types.void(dtype, types.int64, types.int64, types.float32), codegen
