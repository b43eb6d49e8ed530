"""Matrix products of a few query rows with a page of the cache, in registers.

Numba's own loops leave the accumulators in memory. These are written in LLVM's
vectors: a product of up to :data:`ROWS` rows and a few vectors of columns keeps
all sums in registers and reads the page in place, in its own dtype. The shape
follows the machine's vector registers (:data:`LANES`, :data:`TILES`); LLVM turns
the same code into AVX2, AVX-512 or Neon. Where the CPU multiplies pairs of bfloat16
fast (AVX512_BF16 on Zen), keys stored as pairs are multiplied without a conversion.

A page of a head is [2N, D] numbers. Its first half holds the keys with the token
last, so that a vector is one dim of :data:`LANES` tokens and no sum runs across a
vector: [D, N], and for bfloat16 [D/2, N, 2], a token's dims 2i and 2i + 1 side by
side. Its second half holds the values, [N, D]. This is also how vLLM's own CPU
kernel lays a float32 page out.

Shape letters: M rows, K summed, V vectors of columns, D head size, N block size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from vllm_sink_kernels.cpu.layouts import PLAIN, TILED
from vllm_sink_kernels.cpu.native import CPU_NAME, FEATURES, LANES
from vllm_sink_kernels.cpu.vectors import (
    F32,
    I32,
    I64,
    BFloat,
    call,
    load,
    multiply_add,
    own_function,
    splat,
    vec,
)

# Whether products of bfloat16 pairs into float32 sums are used where there are any: on
# an Emerald Rapids a tile of queries takes a fifth longer with them than with products
# of float32, conversions included. On Zen they are what the published figures are with.
HAS_DOT = {"avx512bf16", "avx512f"} <= FEATURES and CPU_NAME.startswith("znver")
# (vectors, most rows) of the products, widest first: 32 registers of 16 floats, or 16
# registers of 8 (32 of 4 on other CPUs).
TILES: tuple[tuple[int, int], ...] = ((4, 3), (2, 6), (1, 6), (1, 6))
if LANES == 16:
    TILES = ((8, 3), (4, 6), (2, 6), (1, 6))
# Rows of a product.
ROWS = 6


def _high_half(builder: Any, bits: Any) -> Any:
    """Vectors of int32 whose upper half is a bfloat16, as float32."""
    return builder.bitcast(bits, vec(F32))


def _columns(builder: Any, kind: str, address: Any) -> list[Any]:
    """A vector of columns: one of float32, or two of a pair's two numbers."""
    if kind == "float32":
        return [load(builder, address, vec(F32), 4)]
    if kind == "float16":
        half = load(builder, address, vec(ir.HalfType()), 2)
        return [builder.fpext(half, vec(F32))]
    upper = splat(builder, I32(16))
    if kind == "bfloat16":
        bits = builder.zext(load(builder, address, vec(ir.IntType(16)), 2), vec(I32))
        return [_high_half(builder, builder.shl(bits, upper))]
    pair = load(builder, address, vec(I32), 4)
    if kind == "dot":
        return [pair]
    assert kind == "pairs", kind
    mask = splat(builder, I32(0xFFFF0000))
    return [
        _high_half(builder, builder.shl(pair, upper)),
        _high_half(builder, builder.and_(pair, mask)),
    ]


# Bytes of one number of a row of columns; a pair is one.
_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "pairs": 4, "dot": 4}


class Kind(NamedTuple):
    """Which product.

    Args:
        columns: What a row of B consists of: "float32", "float16", "bfloat16", or
            "pairs" and "dot", pairs of bfloat16 that belong to two rows.
        adds: Whether C's numbers are added to.
        tiled: Whether B's vectors of columns are apart.
    """

    columns: str
    adds: bool
    tiled: bool

    @property
    def name(self) -> str:
        return f"{self.columns}_{int(self.adds)}_{int(self.tiled)}"


def _emit(builder: Any, product: Kind, rows: int, vectors: int, arguments: Any):
    """C (+)= A B for so many rows and vectors, a loop over K."""
    kind, adds, tiled = product
    a, lda, b, ldb, step_b, c, ldc, k = arguments
    # A constant where it can be one: an address of its own for each vector else.
    width = step_b if tiled else I64(LANES * _SIZES[kind])

    def at_c(m: int, v: int) -> Any:
        row = builder.add(c, builder.mul(ldc, I64(m)))
        return builder.add(row, I64(v * LANES * 4))

    zero = ir.Constant(vec(F32), [0.0] * LANES)
    cells = [(m, v) for m in range(rows) for v in range(vectors)]
    start = [load(builder, at_c(*x), vec(F32), 4) if adds else zero for x in cells]
    entry = builder.block
    loop = builder.append_basic_block("products")
    done = builder.append_basic_block("sums")
    some = builder.icmp_signed(">", k, I64(0))
    builder.cbranch(some, loop, done)
    builder.position_at_end(loop)
    i = builder.phi(I64)
    i.add_incoming(I64(0), entry)
    at_a, at_b = builder.phi(I64), builder.phi(I64)
    at_a.add_incoming(a, entry)
    at_b.add_incoming(b, entry)
    sums = []
    for value in start:
        phi = builder.phi(vec(F32))
        phi.add_incoming(value, entry)
        sums.append(phi)
    columns = [
        _columns(builder, kind, builder.add(at_b, builder.mul(width, I64(v))))
        for v in range(vectors)
    ]
    new = list(sums)
    steps = 2 if kind == "pairs" else 1
    for m in range(rows):
        row = builder.add(at_a, builder.mul(lda, I64(m)))
        for step in range(steps):
            if kind == "dot":
                bits = splat(builder, load(builder, row, I32, 4))
                pairs = ir.VectorType(BFloat(), 2 * LANES)
                x = builder.bitcast(bits, pairs)
            else:
                number = builder.add(row, I64(4 * step))
                x = splat(builder, load(builder, number, F32, 4))
            for v in range(vectors):
                j = m * vectors + v
                y = columns[v][step]
                if kind == "dot":
                    new[j] = call(
                        builder,
                        "llvm.x86.avx512bf16.dpbf16ps.512",
                        vec(F32),
                        [new[j], x, builder.bitcast(y, pairs)],
                    )
                else:
                    new[j] = multiply_add(builder, x, y, new[j])
    after = builder.add(i, I64(1))
    i.add_incoming(after, loop)
    at_a.add_incoming(builder.add(at_a, I64(4 * steps)), loop)
    at_b.add_incoming(builder.add(at_b, ldb), loop)
    for phi, value in zip(sums, new, strict=True):
        phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", after, k), loop, done)
    builder.position_at_end(done)
    for cell, before, value in zip(cells, start, new, strict=True):
        final = builder.phi(vec(F32))
        final.add_incoming(before, entry)
        final.add_incoming(value, loop)
        # Phis come first in their block: the stores follow below.
        sums[cells.index(cell)] = final
    for cell, final in zip(cells, sums, strict=True):
        pointer = builder.inttoptr(at_c(*cell), vec(F32).as_pointer())
        builder.store(final, pointer, align=4)


def _product(module: Any, kind: Kind, vectors: int, max_rows: int) -> Any:
    """(a, lda, b, ldb, step, c, ldc, k, rows): ``rows`` <= ``max_rows``."""
    function, is_new = own_function(module, f"sink_product_{kind.name}_{vectors}", 9)
    if is_new:
        *numbers, count = function.args
        builder = ir.IRBuilder(function.append_basic_block())
        end = builder.append_basic_block("end")
        blocks = [builder.append_basic_block() for _ in range(max_rows)]
        switch = builder.switch(count, end)
        for m, block in enumerate(blocks, 1):
            switch.add_case(I64(m), block)
            builder.position_at_end(block)
            _emit(builder, kind, m, vectors, numbers)
            builder.branch(end)
        builder.position_at_end(end)
        builder.ret_void()
    return function


def _matmul(module: Any, kind: Kind) -> Any:
    """C (+)= A B over (a, lda, b, ldb, step, c, ldc, k, rows, columns), see below."""
    function, is_new = own_function(module, f"sink_matmul_{kind.name}", 10)
    if not is_new:
        return function
    (wide, wide_rows), (n0, _), (n1, _), (n2, _) = TILES
    widest, p0, p1, p2 = (_product(module, kind, n, most) for n, most in TILES)
    a, lda, b, ldb, step_b, c, ldc, k, rows, columns = function.args
    if not kind.tiled:
        step_b = I64(LANES * _SIZES[kind.columns])
    builder = ir.IRBuilder(function.append_basic_block())
    v = cgutils.alloca_once_value(builder, I64(0))

    def ceil_div(x: Any, y: Any) -> Any:
        return builder.sdiv(builder.add(x, builder.sub(y, I64(1))), y)

    each = ceil_div(rows, ceil_div(rows, I64(ROWS)))
    test, body, end = (builder.append_basic_block() for _ in range(3))
    builder.branch(test)
    builder.position_at_end(test)
    done = builder.load(v)
    left = builder.sub(columns, done)
    builder.cbranch(builder.icmp_signed(">", left, I64(0)), body, end)
    builder.position_at_end(body)

    def is_left(n: int) -> Any:
        return builder.icmp_signed(">=", left, I64(n))

    def advance(n: Any) -> None:
        builder.store(builder.add(done, n), v)

    at_b = builder.add(b, builder.mul(done, step_b))
    at_c = builder.add(c, builder.mul(done, I64(LANES * 4)))
    few = builder.icmp_signed("<=", rows, I64(wide_rows))
    with builder.if_else(builder.and_(is_left(wide), few)) as (then, otherwise):
        with then:
            builder.call(widest, [a, lda, at_b, ldb, step_b, at_c, ldc, k, rows])
            advance(I64(wide))
        with otherwise:
            with cgutils.for_range_slice(builder, I64(0), rows, each, I64) as (m, _):
                after = builder.sub(rows, m)
                n = builder.select(builder.icmp_signed("<", each, after), each, after)
                at_a = builder.add(a, builder.mul(m, lda))
                to = builder.add(at_c, builder.mul(m, ldc))
                numbers = [at_a, lda, at_b, ldb, step_b, to, ldc, k, n]
                with builder.if_else(is_left(n0)) as (most, fewer):
                    with most:
                        builder.call(p0, numbers)
                    with fewer, builder.if_else(is_left(n1)) as (some, least):
                        with some:
                            builder.call(p1, numbers)
                        with least:
                            builder.call(p2, numbers)
            step = builder.select(is_left(n1), I64(n1), I64(n2))
            advance(builder.select(is_left(n0), I64(n0), step))
    builder.branch(test)
    builder.position_at_end(end)
    builder.ret_void()
    return function


_PLAIN = {types.float32: "float32", types.int16: "float16", types.uint16: "bfloat16"}


def _keys_kind(layout: int, dtype: Any, q_dtype: Any = None) -> Kind:
    columns = _PLAIN[dtype.dtype]
    if columns == "bfloat16" and layout != PLAIN:
        is_dot = HAS_DOT and q_dtype is not None and q_dtype.dtype == types.uint16
        columns = "dot" if is_dot else "pairs"
    return Kind(columns, False, layout == TILED)


def _values_kind(layout: int, dtype: Any) -> Kind:
    columns = "pairs" if layout == TILED else _PLAIN[dtype.dtype]
    return Kind(columns, True, layout == TILED)


# C (+)= A B over addresses. All arguments but the first few, constants, are int64,
# addresses and strides in bytes:
#   a, lda: [M, K] float32 rows; for kind "dot" [M, K] pairs of bfloat16, for "pairs"
#       [M, 2K] float32.
#   b, ldb, step: [K, columns] of the kind; from a vector of columns to the next, where
#       they don't follow one another.
#   c, ldc: [M, columns] float32.
#   k: K. rows: M. columns: vectors of LANES.


def _call_matmul(context: Any, builder: Any, kind: Kind, arguments: Any) -> Any:
    builder.call(_matmul(builder.module, kind), arguments[-10:])
    return context.get_dummy_value()


@intrinsic(prefer_literal=True)
def keys_product(
    typing_context,
    layout,
    dtype,
    q_dtype,
    a,
    lda,
    b,
    ldb,
    step,
    c,
    ldc,
    k,
    rows,
    columns,
):
    """C = Q K^T, keys of ``dtype``, the queries in the dtype ``q_dtype``."""

    def codegen(context, builder, signature, arguments):
        kind = _keys_kind(layout.literal_value, dtype, q_dtype)
        return _call_matmul(context, builder, kind, arguments)

    return types.void(layout, dtype, q_dtype, *[types.int64] * 10), codegen


@intrinsic(prefer_literal=True)
def turned_product(
    typing_context, layout, dtype, a, lda, b, ldb, step, c, ldc, k, rows, columns
):
    """C = Q K^T, keys of ``dtype``, the queries in float32."""

    def codegen(context, builder, signature, arguments):
        kind = _keys_kind(layout.literal_value, dtype)
        return _call_matmul(context, builder, kind, arguments)

    return types.void(layout, dtype, *[types.int64] * 10), codegen


@intrinsic(prefer_literal=True)
def values_product(
    typing_context, layout, dtype, a, lda, b, ldb, step, c, ldc, k, rows, columns
):
    """C += P V, values of ``dtype``."""

    def codegen(context, builder, signature, arguments):
        kind = _values_kind(layout.literal_value, dtype)
        return _call_matmul(context, builder, kind, arguments)

    return types.void(layout, dtype, *[types.int64] * 10), codegen
