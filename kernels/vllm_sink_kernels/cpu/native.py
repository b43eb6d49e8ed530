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

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload

from vllm_sink_kernels.cpu.disk_cache import has_room

# No "nnan"/"ninf": a NaN must stay one, and -inf is the empty maximum.
OPTIONS: dict[str, Any] = {
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
    "error_model": "numpy",
    "cache": has_room(),
}
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


@intrinsic
def _float_of(typing_context, bits):
    """The float32 whose bits the int32 holds."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), codegen


@intrinsic
def _float_of_half(typing_context, bits):
    """The IEEE half whose bits the int16 holds, as float32."""

    def codegen(context, builder, signature, arguments):
        half = builder.bitcast(arguments[0], ir.HalfType())
        return builder.fpext(half, context.get_value_type(types.float32))

    return types.float32(types.int16), codegen


def at(row, d):
    """``row[d]`` as float32, from any storage type."""
    raise NotImplementedError("compiled code only")


@overload(at, inline="always")
def _at_of(row, d):
    if row.dtype == types.uint16:  # bfloat16: the upper half of a float32
        return lambda row, d: _float_of(np.int32(row[d]) << np.int32(16))
    if row.dtype == types.int16:
        return lambda row, d: _float_of_half(row[d])
    return lambda row, d: row[d]


# 2**r = 1 + r (c[0] + c[1] r + ...) for r in [-1/2, 1/2]: of this degree the
# smallest largest relative error, 9.2e-8.
EXP2 = (0.69314700365, 0.24022242427, 0.05550733581, 0.00967151299, 0.00132647273)


@numba.njit(inline="always", **OPTIONS)
def exp2(x):
    """2**x for x <= 0 in float32, 2 ulp, nothing below 2**-126."""
    x = max(x, np.float32(-126.0))
    n = np.rint(x)
    r = x - n
    p = np.float32(EXP2[4])
    p = p * r + np.float32(EXP2[3])
    p = p * r + np.float32(EXP2[2])
    p = p * r + np.float32(EXP2[1])
    p = p * r + np.float32(EXP2[0])
    p = p * r + np.float32(1.0)
    return p * _float_of((np.int32(n) + np.int32(127)) << np.int32(23))


@intrinsic
def _bits_of(typing_context, x):
    """The int32 whose bits the float32 has."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def _half_of(typing_context, x):
    """The bits of the nearest IEEE half."""

    def codegen(context, builder, signature, arguments):
        half = builder.fptrunc(arguments[0], ir.HalfType())
        return builder.bitcast(half, ir.IntType(16))

    return types.int16(types.float32), codegen


def put(row, d, x):
    """``row[d] = x``, a float32, rounded to nearest even in any storage type."""
    raise NotImplementedError("compiled code only")


@overload(put, inline="always")
def _put_of(row, d, x):
    if row.dtype == types.uint16:

        def put_bfloat16(row, d, x):
            bits = _bits_of(x)
            odd = (bits >> np.int32(16)) & np.int32(1)
            rounded = (bits + np.int32(0x7FFF) + odd) >> np.int32(16)
            # A NaN's rounding could carry into the sign.
            row[d] = np.uint16(rounded if x == x else np.int32(0x7FC0))

        return put_bfloat16
    if row.dtype == types.int16:

        def put_float16(row, d, x):
            row[d] = _half_of(x)

        return put_float16

    def put_float32(row, d, x):
        row[d] = x

    return put_float32
