"""Products of bfloat16 in tiles, as AMX multiplies them, for the rows of a prompt.

Keys of a page stand as a tile takes them (:mod:`tile_ops`), in our own layout and in
vLLM's; values are copied into pairs of tokens, once for all the rows, and a token that
isn't seen is zero there: zero times NaN would be one. Weights are rounded to bfloat16
as they are taken; all sums are float32.

A loop that uses tiles configures them before and gives back the configuration that it
found: vLLM's and torch's kernels have tiles, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from vllm_sink_kernels.cpu.layouts import TILED
from vllm_sink_kernels.cpu.native import LANES
from vllm_sink_kernels.cpu.tile_ops import (
    ROW_BYTES,
    SIDE,
    TILE_BYTES,
    Amx,
    Emulated,
    made_function,
    stack_room,
    store,
)
from vllm_sink_kernels.cpu.vectors import F32, I32, I64, BFloat, load, splat, vec

# What multiplies tiles: nothing, AMX, or loops that do the same.
NONE, AMX, EMULATED = range(3)
# Tokens of a product with values: their pairs stay in the first-level cache.
TOKENS = 128
# Tokens that a tile of weights multiplies.
DEPTH = 2 * SIDE
I16 = ir.IntType(16)
_OPERATIONS: dict[int, type[Amx] | type[Emulated]] = {AMX: Amx, EMULATED: Emulated}


def _product(kind: int, adds: bool) -> Callable:
    """C (+)= A B, all of whole tiles.

    Its arguments, all int64: address, bytes from row to row, from tile to tile and from
    a step of K to the next, of A and of B; address and bytes of a row of C; steps of K;
    tiles of rows and of columns. C's tiles stand in one array of rows.
    """

    def emit(builder, a, a_row, a_tile, a_k, b, b_row, b_tile, b_k, c, c_row, k, *size):
        tiles = _OPERATIONS[kind](builder)
        rows, columns = size
        c_tile = builder.mul(c_row, I64(SIDE))

        def block(at_a, at_b, at_c, num_rows, num_columns):
            cells = [(i, j) for i in range(num_rows) for j in range(num_columns)]
            places = [
                builder.add(
                    builder.add(at_c, I64(j * ROW_BYTES)), builder.mul(c_tile, I64(i))
                )
                for i, j in cells
            ]
            for (i, j), place in zip(cells, places, strict=True):
                if adds:
                    tiles.load(2 * i + j, place, c_row)
                else:
                    tiles.zero(2 * i + j)
            with cgutils.for_range(builder, k, intp=I64) as step:
                from_a = builder.add(at_a, builder.mul(step.index, a_k))
                from_b = builder.add(at_b, builder.mul(step.index, b_k))
                for j in range(num_columns):
                    tiles.load(
                        6 + j, builder.add(from_b, builder.mul(b_tile, I64(j))), b_row
                    )
                for i in range(num_rows):
                    tiles.load(
                        4 + i, builder.add(from_a, builder.mul(a_tile, I64(i))), a_row
                    )
                for i, j in cells:
                    tiles.multiply(2 * i + j, 4 + i, 6 + j)
            for (i, j), place in zip(cells, places, strict=True):
                tiles.store(2 * i + j, place, c_row)

        def pairs(count):
            return cgutils.for_range_slice(builder, I64(0), count, I64(2), I64)

        with pairs(rows) as (i, _):
            at_a = builder.add(a, builder.mul(i, a_tile))
            two_rows = builder.icmp_signed(">", rows, builder.add(i, I64(1)))
            with pairs(columns) as (j, _):
                at_b = builder.add(b, builder.mul(j, b_tile))
                at_c = builder.add(c, builder.mul(i, c_tile))
                at_c = builder.add(at_c, builder.mul(j, I64(ROW_BYTES)))
                two = builder.icmp_signed(">", columns, builder.add(j, I64(1)))
                for num_rows in (1, 2):
                    is_so = two_rows if num_rows == 2 else builder.not_(two_rows)
                    with (
                        builder.if_then(is_so),
                        builder.if_else(two) as (both, single),
                    ):
                        with both:
                            block(at_a, at_b, at_c, num_rows, 2)
                        with single:
                            block(at_a, at_b, at_c, num_rows, 1)

    return emit


def _call_product(builder: Any, kind: int, adds: bool, *arguments: Any) -> None:
    name = f"sink_tiles_{_OPERATIONS[kind].name}_{int(adds)}"
    emit = _product(kind, adds)
    function = made_function(builder.module, name, len(arguments), emit)
    builder.call(function, arguments)


def _round_weights(builder, weights, pitch, skip, count, rows, to, steps):
    """Weights [rows, count] float32 -> tiles [rows / 16, steps] of bfloat16.

    Args:
        skip: Numbers of a row before its first one; those and what follows the
            last are zero.
    """
    lanes = ir.Constant(vec(I32), list(range(LANES)))
    zero = ir.Constant(vec(F32), [0.0] * LANES)
    end = splat(builder, builder.trunc(count, I32))
    with cgutils.for_range(builder, rows, intp=I64) as m:
        row = builder.add(weights, builder.mul(m.index, pitch))
        tile = builder.mul(builder.sdiv(m.index, I64(SIDE)), steps)
        line = builder.mul(builder.srem(m.index, I64(SIDE)), I64(ROW_BYTES))
        line = builder.add(builder.mul(tile, I64(TILE_BYTES)), line)
        halves = builder.mul(steps, I64(2))
        with cgutils.for_range(builder, halves, intp=I64) as half:
            first = builder.sub(builder.mul(half.index, I64(LANES)), skip)
            place = builder.add(row, builder.mul(first, I64(4)))
            x = load(builder, place, vec(F32), 4)
            i = builder.add(splat(builder, builder.trunc(first, I32)), lanes)
            x = builder.select(builder.icmp_unsigned("<", i, end), x, zero)
            step = builder.mul(builder.sdiv(half.index, I64(2)), I64(TILE_BYTES))
            part = builder.mul(builder.srem(half.index, I64(2)), I64(ROW_BYTES // 2))
            there = builder.add(builder.add(builder.add(to, line), step), part)
            store(builder, builder.fptrunc(x, vec(BFloat())), there)


def _pair_values(layout: int) -> Callable:
    """Values of some tokens -> tiles [steps, columns] of pairs of tokens.

    Its arguments, all int64: address of the page's values; bytes of a row there and
    from 16 dims to the next; the first token's place in its block and how many; where
    to; steps of 32 tokens; tiles of columns. Tokens before and after are zero.
    """

    def emit(builder, values, row, step, offset, count, to, steps, columns):
        first = builder.and_(offset, I64(-2))
        end = builder.add(offset, count)
        pairs = builder.mul(steps, I64(SIDE))
        upper = splat(builder, I32(16))
        with cgutils.for_range(builder, pairs, intp=I64) as pair:
            token = builder.add(first, builder.mul(pair.index, I64(2)))
            after = builder.add(token, I64(1))
            low = builder.icmp_signed(">=", token, offset)
            high = builder.icmp_signed("<", after, end)
            low = builder.select(low, I32(0xFFFF), I32(0))
            high = builder.select(high, I32(0xFFFF0000), I32(0))
            seen = splat(builder, builder.or_(low, high))
            is_any = builder.icmp_signed("<", token, end)
            tile = builder.mul(builder.sdiv(pair.index, I64(SIDE)), columns)
            line = builder.mul(builder.srem(pair.index, I64(SIDE)), I64(ROW_BYTES))
            line = builder.add(line, builder.mul(tile, I64(TILE_BYTES)))
            with cgutils.for_range(builder, columns, intp=I64) as column:
                there = builder.add(line, builder.mul(column.index, I64(TILE_BYTES)))
                there = builder.add(to, there)
                store(builder, ir.Constant(vec(I32), [0] * LANES), there)
                with builder.if_then(is_any):
                    if layout == TILED:
                        at = builder.add(values, builder.mul(column.index, step))
                        at = builder.add(
                            at, builder.mul(builder.sdiv(token, I64(2)), row)
                        )
                        bits = load(builder, at, vec(I32), 4)
                    else:
                        at = builder.add(values, builder.mul(token, row))
                        at = builder.add(at, builder.mul(column.index, I64(2 * SIDE)))
                        one, other = (
                            builder.zext(load(builder, x, vec(I16), 2), vec(I32))
                            for x in (at, builder.add(at, row))
                        )
                        bits = builder.or_(one, builder.shl(other, upper))
                    store(builder, builder.and_(bits, seen), there)

    return emit


def _values(kind: int, layout: int) -> Callable:
    """The body of :func:`tiled_values`."""

    def emit(
        builder, weights, pitch, values, row, step, offset, count, c, c_row, *rest
    ):
        rows, columns, room = rest
        module = builder.module
        skip = builder.and_(offset, I64(1))
        steps = builder.add(builder.add(skip, count), I64(DEPTH - 1))
        steps = builder.sdiv(steps, I64(DEPTH))
        name = f"sink_tiles_values_{layout}"
        pack = made_function(module, name, 8, _pair_values(layout))
        builder.call(pack, [values, row, step, offset, count, room, steps, columns])
        size = 2 * (TOKENS // DEPTH) * TILE_BYTES
        rounded = stack_room(builder, size)
        a_tile = builder.mul(steps, I64(TILE_BYTES))
        b_k = builder.mul(columns, I64(TILE_BYTES))
        with cgutils.for_range_slice(builder, I64(0), rows, I64(2 * SIDE), I64) as (
            m,
            _,
        ):
            left = builder.sub(rows, m)
            is_all = builder.icmp_signed("<", left, I64(2 * SIDE))
            left = builder.select(is_all, left, I64(2 * SIDE))
            own = made_function(module, "sink_tiles_weights", 7, _round_weights)
            at = builder.add(weights, builder.mul(m, pitch))
            builder.call(own, [at, pitch, skip, count, left, rounded, steps])
            _call_product(
                builder,
                kind,
                True,
                *(rounded, I64(ROW_BYTES), a_tile, I64(TILE_BYTES)),
                *(room, I64(ROW_BYTES), I64(TILE_BYTES), b_k),
                *(builder.add(c, builder.mul(m, c_row)), c_row, steps),
                *(_ceil_div(builder, left, SIDE), columns),
            )

    return emit


def _ceil_div(builder: Any, x: Any, y: int) -> Any:
    return builder.sdiv(builder.add(x, I64(y - 1)), I64(y))


# All arguments but the first, constants, are int64, addresses and strides in bytes.
# Rows up to a multiple of 16 are read and written.


@intrinsic(prefer_literal=True)
def tiled_keys(typing_context, kind, a, lda, b, ldb, step, c, ldc, k, rows, columns):
    """C = Q K^T as :func:`.micro.keys_product`: queries [rows, K] pairs of bfloat16,
    keys in pairs of dims; ``step`` from 16 tokens to the next, columns in 16."""

    def codegen(context, builder, signature, arguments):
        _, a, lda, b, ldb, step, c, ldc, k, rows, columns = arguments
        if kind.literal_value != NONE:
            _call_product(
                builder,
                kind.literal_value,
                False,
                *(a, lda, builder.mul(lda, I64(SIDE)), I64(ROW_BYTES)),
                *(b, ldb, step, builder.mul(ldb, I64(SIDE))),
                *(c, ldc, builder.sdiv(k, I64(SIDE))),
                *(_ceil_div(builder, rows, SIDE), columns),
            )
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 10), codegen


@intrinsic(prefer_literal=True)
def tiled_values(
    typing_context,
    kind,
    layout,
    weights,
    pitch,
    values,
    row,
    step,
    offset,
    count,
    c,
    ldc,
    rows,
    columns,
    room,
):
    """C += P V of tokens [offset, offset + count) of a page.

    At most TOKENS of them, of an odd first one at most one fewer.

    Args:
        weights, pitch: [rows, count] float32; zero where a row doesn't see a token.
        values, row, step: Of the page: bytes of a token (of a pair, in tiles) and from
            16 dims to the next.
        c, ldc: [rows, 16 columns] float32.
        room: Address of TOKENS x 16 columns numbers of 2 bytes.
    """

    def codegen(context, builder, signature, arguments):
        if kind.literal_value != NONE:
            name = f"sink_tiles_sums_{kind.literal_value}_{layout.literal_value}"
            emit = _values(kind.literal_value, layout.literal_value)
            function = made_function(builder.module, name, 12, emit)
            builder.call(function, arguments[2:])
        return context.get_dummy_value()

    return types.void(kind, layout, *[types.int64] * 12), codegen


@intrinsic(prefer_literal=True)
def begin_tiles(typing_context, kind, saved):
    """This thread's tiles are configured; 64 bytes at ``saved`` keep what was."""

    def codegen(context, builder, signature, arguments):
        if kind.literal_value != NONE:
            _OPERATIONS[kind.literal_value](builder).begin(arguments[1])
        return context.get_dummy_value()

    return types.void(kind, types.int64), codegen


@intrinsic(prefer_literal=True)
def end_tiles(typing_context, kind, saved):
    """This thread's tiles are configured as they were."""

    def codegen(context, builder, signature, arguments):
        if kind.literal_value != NONE:
            _OPERATIONS[kind.literal_value](builder).end(arguments[1])
        return context.get_dummy_value()

    return types.void(kind, types.int64), codegen
