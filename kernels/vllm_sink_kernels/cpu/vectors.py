"""LLVM's vectors: what loops are written in, and the softmax's passes over a row."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from vllm_sink_kernels.cpu.native import LANES

F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)


class BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


def vec(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, LANES)


def load(builder: Any, address: Any, element: ir.Type, align: int) -> Any:
    pointer = builder.inttoptr(address, element.as_pointer())
    return builder.load(pointer, align=align)


def splat(builder: Any, scalar: Any, width: int = LANES) -> Any:
    vector = ir.VectorType(scalar.type, width)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, I32(0))
    zeros = ir.Constant(ir.VectorType(I32, width), [0] * width)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


def call(builder: Any, name: str, result: ir.Type, arguments: list[Any]) -> Any:
    signature = ir.FunctionType(result, [x.type for x in arguments])
    function = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(function, arguments)


def own_function(module: Any, name: str, num_arguments: int) -> tuple[Any, bool]:
    """A module's own function of so many int64, and whether it has no body yet.

    A function that Numba compiles is a library, which is optimized and turned into
    machine code by itself and again in everything that calls it.
    """
    known = module.globals.get(name)
    if known is not None:
        return known, False
    signature = ir.FunctionType(ir.VoidType(), [I64] * num_arguments)
    function = ir.Function(module, signature, name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    return function, True


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call(builder, f"llvm.fmuladd.v{LANES}f32", c.type, [a, b, c])


@intrinsic
def largest(typing_context, address, count):
    """The largest of ``count`` vectors of float32 at an address, NaN aside."""

    def codegen(context, builder, signature, arguments):
        address, count = arguments
        lowest = ir.Constant(vec(F32), [float("-inf")] * LANES)
        top = cgutils.alloca_once_value(builder, lowest)
        with cgutils.for_range(builder, count, intp=I64) as loop:
            place = builder.add(address, builder.mul(loop.index, I64(4 * LANES)))
            x = load(builder, place, vec(F32), 4)
            old = builder.load(top)
            above = builder.fcmp_ordered(">", x, old)
            builder.store(builder.select(above, x, old), top)
        name = f"llvm.vector.reduce.fmax.v{LANES}f32"
        return call(builder, name, F32, [builder.load(top)])

    return types.float32(types.int64, types.int64), codegen


# 2**r = 1 + r (c[0] + c[1] r + ...) for r in [-1/2, 1/2]: of this degree the
# smallest largest relative error, 9.2e-8.
EXP2 = (0.69314700365, 0.24022242427, 0.05550733581, 0.00967151299, 0.00132647273)


def _exp2(builder: Any, x: Any) -> Any:
    """2**x for x <= 0, a float32 or a vector; 2 ulp, nothing below 2**-126."""
    is_vector = isinstance(x.type, ir.VectorType)
    integers = vec(I32) if is_vector else I32
    suffix = f"v{LANES}f32" if is_vector else "f32"

    def constant(number: float) -> Any:
        value = float(np.float32(number))
        return ir.Constant(x.type, [value] * LANES if is_vector else value)

    # Not maxnum: a NaN must stay one.
    low = builder.fcmp_ordered("<", x, constant(-126.0))
    x = builder.select(low, constant(-126.0), x)
    n = call(builder, f"llvm.rint.{suffix}", x.type, [x])
    r = builder.fsub(x, n)
    p = constant(EXP2[-1])
    for term in (*EXP2[-2::-1], 1.0):
        p = call(builder, f"llvm.fmuladd.{suffix}", x.type, [p, r, constant(term)])
    # p is within [1/2, 2]: n more in its exponent.
    places = ir.Constant(integers, [23] * LANES if is_vector else 23)
    n = builder.shl(builder.fptosi(n, integers), places)
    bits = builder.add(builder.bitcast(p, integers), n)
    return builder.bitcast(bits, x.type)


@intrinsic
def exp2(typing_context, x):
    """2**x for x <= 0."""

    def codegen(context, builder, signature, arguments):
        return _exp2(builder, arguments[0])

    return types.float32(types.float32), codegen


@intrinsic
def exp2_sum(typing_context, address, count, scale, top):
    """x = 2**(scale x - top) for ``count`` vectors of float32; their sum.

    The products of the polynomial and everything else go to different units of most
    CPUs.
    """

    def codegen(context, builder, signature, arguments):
        address, count, scale, top = arguments

        scale, top = splat(builder, scale), builder.fneg(splat(builder, top))
        zero = ir.Constant(vec(F32), [0.0] * LANES)
        total = cgutils.alloca_once_value(builder, zero)
        with cgutils.for_range(builder, count, intp=I64) as loop:
            place = builder.add(address, builder.mul(loop.index, I64(4 * LANES)))
            x = load(builder, place, vec(F32), 4)
            x = multiply_add(builder, x, scale, top)
            x = _exp2(builder, x)
            builder.store(x, builder.inttoptr(place, x.type.as_pointer()), align=4)
            builder.store(builder.fadd(builder.load(total), x), total)
        name = f"llvm.vector.reduce.fadd.v{LANES}f32"
        signature = ir.FunctionType(F32, [F32, vec(F32)])
        function = cgutils.get_or_insert_function(builder.module, signature, name)
        return builder.call(
            function, [F32(0.0), builder.load(total)], fastmath=("reassoc",)
        )

    arguments = types.int64, types.int64, types.float32, types.float32
    return types.float32(*arguments), codegen
