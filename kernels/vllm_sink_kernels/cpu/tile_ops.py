"""What a tile does: AMX's own instructions, and the same in memory for tests.

A tile is 16 rows of 64 bytes. Three of them are multiplied at a time: C, 16 rows of 16
float32, gets A, 16 rows of 16 pairs of bfloat16, times B, the 16 rows of whose pairs
are what A's pairs are multiplied with: [16, 16, 2].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from vllm_sink_kernels.cpu.native import LANES
from vllm_sink_kernels.cpu.vectors import (
    F32,
    I32,
    I64,
    call,
    load,
    multiply_add,
    own_function,
    splat,
    vec,
)

# Rows of a tile, and float32 or pairs of bfloat16 of a row.
SIDE = 16
ROW_BYTES = 64
TILE_BYTES = SIDE * ROW_BYTES
# The configuration of eight tiles of full size: what ``ldtilecfg`` reads.
CONFIGURATION = bytes([1, *[0] * 15, *[ROW_BYTES, 0] * 8, *[0] * 16, *[SIDE] * 8]) + (
    bytes(8)
)
I8 = ir.IntType(8)


class Amx:
    """AMX's eight tiles, by number; addresses and strides are int64, in bytes."""

    name = "amx"

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def _call(self, name: str, *arguments: Any) -> None:
        call(self.builder, f"llvm.x86.{name}", ir.VoidType(), list(arguments))

    def _pointer(self, address: Any) -> Any:
        return self.builder.inttoptr(address, cgutils.voidptr_t)

    def zero(self, tile: int) -> None:
        self._call("tilezero", I8(tile))

    def load(self, tile: int, address: Any, stride: Any) -> None:
        self._call("tileloadd64", I8(tile), self._pointer(address), stride)

    def store(self, tile: int, address: Any, stride: Any) -> None:
        self._call("tilestored64", I8(tile), self._pointer(address), stride)

    def multiply(self, c: int, a: int, b: int) -> None:
        self._call("tdpbf16ps", I8(c), I8(a), I8(b))

    def begin(self, saved: Any) -> None:
        """Configure the tiles; what was configured before is put at ``saved``."""
        self._call("sttilecfg", self._pointer(saved))
        kind = ir.ArrayType(I8, len(CONFIGURATION))
        place = stack_room(self.builder, len(CONFIGURATION))
        numbers = ir.Constant(kind, bytearray(CONFIGURATION))
        self.builder.store(numbers, self.builder.inttoptr(place, kind.as_pointer()))
        self._call("ldtilecfg", self._pointer(place))

    def end(self, saved: Any) -> None:
        """What was configured is again; nothing, where nothing was."""
        self._call("ldtilecfg", self._pointer(saved))


class Emulated:
    """The same in memory."""

    name = "emulated"

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self.tiles = stack_room(builder, 8 * TILE_BYTES)

    def _tile(self, tile: int) -> Any:
        return self.builder.add(self.tiles, I64(tile * TILE_BYTES))

    def zero(self, tile: int) -> None:
        zero = ir.Constant(vec(I32), [0] * LANES)
        for i in range(SIDE):
            place = self.builder.add(self._tile(tile), I64(ROW_BYTES * i))
            store(self.builder, zero, place)

    def load(self, tile: int, address: Any, stride: Any) -> None:
        self._copy(address, stride, self._tile(tile), I64(ROW_BYTES))

    def store(self, tile: int, address: Any, stride: Any) -> None:
        self._copy(self._tile(tile), I64(ROW_BYTES), address, stride)

    def _copy(self, source: Any, from_row: Any, to: Any, to_row: Any) -> None:
        builder = self.builder
        with cgutils.for_range(builder, I64(SIDE), intp=I64) as row:
            place = builder.add(source, builder.mul(row.index, from_row))
            x = load(builder, place, vec(I32), 1)
            store(builder, x, builder.add(to, builder.mul(row.index, to_row)))

    def multiply(self, c: int, a: int, b: int) -> None:
        module = self.builder.module
        function = made_function(module, "sink_emulated_product", 3, _emulated_product)
        self.builder.call(function, [self._tile(x) for x in (c, a, b)])

    def begin(self, saved: Any) -> None:
        pass

    def end(self, saved: Any) -> None:
        pass


def _emulated_product(builder: Any, c: Any, a: Any, b: Any) -> None:
    """C += A B of three tiles in memory."""
    upper, lower = splat(builder, I32(0xFFFF0000)), splat(builder, I32(16))

    def pair(bits: Any) -> list[Any]:
        halves = builder.shl(bits, lower), builder.and_(bits, upper)
        return [builder.bitcast(x, vec(F32)) for x in halves]

    with cgutils.for_range(builder, I64(SIDE), intp=I64) as m:
        at_row = builder.mul(m.index, I64(ROW_BYTES))
        place, row = builder.add(c, at_row), builder.add(a, at_row)
        total = cgutils.alloca_once_value(builder, load(builder, place, vec(F32), 4))
        with cgutils.for_range(builder, I64(SIDE), intp=I64) as k:
            number = builder.add(row, builder.mul(k.index, I64(4)))
            x = pair(splat(builder, load(builder, number, I32, 4)))
            line = builder.add(b, builder.mul(k.index, I64(ROW_BYTES)))
            y = pair(load(builder, line, vec(I32), 4))
            for one, other in zip(x, y, strict=True):
                new = multiply_add(builder, one, other, builder.load(total))
                builder.store(new, total)
        store(builder, builder.load(total), place)


def stack_room(builder: Any, size: int) -> Any:
    """The address of so many bytes of the stack; Numba's would be filled with zeros."""
    with builder.goto_entry_block():
        place = builder.alloca(ir.ArrayType(I8, size))
        place.align = ROW_BYTES
        return builder.ptrtoint(place, I64)


def store(builder: Any, x: Any, address: Any) -> None:
    builder.store(x, builder.inttoptr(address, x.type.as_pointer()), align=1)


def made_function(
    module: Any, name: str, num_arguments: int, emit: Callable[..., None]
) -> Any:
    """A module's own function of so many int64, which ``emit`` gives its body once."""
    function, is_new = own_function(module, name, num_arguments)
    if is_new:
        builder = ir.IRBuilder(function.append_basic_block())
        emit(builder, *function.args)
        builder.ret_void()
    return function
