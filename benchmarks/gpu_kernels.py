"""Times of the kernels on a GPU, beside what else could answer the same step.

``scripts/gpu_check.py`` calls ``time_kernels`` and writes its rows as CSV. Peers are
run on the same cache where they can page: the window alone (the policy's work without
its sinks) and all keys (full attention). One that is not installed is left out.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
import triton
from vllm_sink_kernels.triton import launch_config
from vllm_sink_kernels.triton.decode import sink_decode, workspace_shape
from vllm_sink_kernels.triton.launch_config import LaunchConfig
from vllm_sink_kernels.triton.prefill import sink_prefill

from benchmarks.gpu_batches import (
    DEVICE,
    INTERPRET,
    Paged,
    paged,
    paged_heads,
    rope_table,
)

HEADS = (32, 8)
HEAD_SIZE = 128
BLOCK_SIZE = 16
DTYPE = torch.float16 if INTERPRET else torch.bfloat16  # see tests/kernels/conftest.py
MODEL = f"{HEADS[0]}/{HEADS[1]} heads, d {HEAD_SIZE}, bf16"
LAYOUT = {"head_size": HEAD_SIZE, "block_size": BLOCK_SIZE, "dtype": DTYPE}
POLICIES = [(64, 4, 4092), (1, 4, 4092), (64, 4, 1020)]  # batch, S, W
PROMPTS = [(8192, 4, 2044), (32768, 4, 4092)]  # tokens, S, W
RETRIEVAL = {"none": 0, "a quarter": 2, "half": 4, "all": 8}  # of 8 KV heads
RETRIEVAL_DECODE = (16, 32768)  # requests, tokens of each
RETRIEVAL_PROMPT = 16384
RETRIEVAL_POLICY = (4, 4092)


def run_decode(
    x: Paged, out: torch.Tensor, workspace: torch.Tensor | None = None, **kw: Any
) -> torch.Tensor:
    return sink_decode(
        x.layer_args(out, **kw), x.positions, x.requests, workspace=workspace
    )


def run_prefill(
    x: Paged, out: torch.Tensor, config: LaunchConfig | None = None, **kw: Any
) -> torch.Tensor:
    return sink_prefill(x.layer_args(out, **kw), x.starts, x.lens, config=config)


def bench(fn: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Milliseconds of ``fn`` with L2 cold: (median, p20, p80)."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)
    for _ in range(5):
        fn()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
        start.record()
        fn()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    tenths = statistics.quantiles(times, n=10)
    return statistics.median(times), tenths[1], tenths[7]


def graphed(fn: Callable[[], object]) -> Callable[[], object]:
    """``fn`` as one CUDA graph, so that launch overhead is not timed."""
    for _ in range(3):
        fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


def unified(x: Paged, window: int) -> Callable[[], object]:
    """vLLM's Triton kernel on the cache of ``x``, with a window (0: all keys)."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    q, k, v, _ = x.args
    longest = int(x.lens.max())
    scales = torch.ones(len(x.lens), k.shape[2], device=DEVICE)
    # Enough for its split decode: 16 segments, as vLLM's backend allocates them.
    segments, d = 16, triton.next_power_of_2(q.shape[2])
    shape = (len(q), q.shape[1], segments)
    part = torch.empty(*shape, d, device=DEVICE)
    top, total = torch.empty(shape, device=DEVICE), torch.empty(shape, device=DEVICE)
    table, out = x.safe_table(), torch.empty_like(q)
    return lambda: unified_attention(
        q=q,
        k=k,
        v=v,
        out=out,
        cu_seqlens_q=x.starts,
        max_seqlen_q=x.max_query_len,
        seqused_k=x.lens,
        max_seqlen_k=longest,
        softmax_scale=HEAD_SIZE**-0.5,
        causal=True,
        window_size=(window - 1, 0) if window else (-1, -1),
        block_table=table,
        softcap=0,
        q_descale=None,
        k_descale=scales,
        v_descale=scales,
        seq_threshold_3D=128 // k.shape[2],
        num_par_softmax_segments=segments,
        softmax_segm_output=part,
        softmax_segm_max=top,
        softmax_segm_expsum=total,
    )


def flash(x: Paged, window: int) -> Callable[[], object]:
    """FlashAttention 3, as vLLM ships it, with a window (0: all keys)."""
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    q, k, v, _ = x.args
    longest, table, out = int(x.lens.max()), x.safe_table(), torch.empty_like(q)
    return lambda: flash_attn_varlen_func(
        q,
        k,
        v,
        max_seqlen_q=x.max_query_len,
        cu_seqlens_q=x.starts,
        max_seqlen_k=longest,
        seqused_k=x.lens,
        softmax_scale=HEAD_SIZE**-0.5,
        causal=True,
        window_size=[window - 1, 0] if window else [-1, -1],
        block_table=table,
        out=out,
        fa_version=3,
    )


def sdpa(num_queries: int, batch: int, num_keys: int) -> Callable[[], object]:
    """torch's attention over keys laid out densely; causal for a prompt."""
    ask = torch.randn(
        batch, HEADS[0], num_queries, HEAD_SIZE, device=DEVICE, dtype=DTYPE
    )
    shape = 2, batch, HEADS[1], num_keys, HEAD_SIZE
    kv = torch.randn(shape, device=DEVICE, dtype=DTYPE)
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        ask, kv[0], kv[1], is_causal=num_queries > 1, enable_gqa=True
    )


def flex(n: int, sinks: int, window: int) -> Callable[[], object]:
    """FlexAttention with the policy's mask (``absolute`` positions)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def mask(b, h, p, k):
        return (k <= p) & ((k < sinks) | (p - k < window))

    q = torch.randn(1, HEADS[0], n, HEAD_SIZE, device=DEVICE, dtype=DTYPE)
    kv = torch.randn(2, 1, HEADS[1], n, HEAD_SIZE, device=DEVICE, dtype=DTYPE)
    compiled = torch.compile(flex_attention)
    blocks = create_block_mask(mask, None, None, n, n, device=DEVICE)
    return lambda: compiled(q, kv[0], kv[1], block_mask=blocks, enable_gqa=True)


PEERS = {"vllm unified_attention": unified, "vllm FA3": flash}


class Table:
    """Rows of times; ``gbps`` counts each retained K and V once."""

    def __init__(
        self, repeats: int, write: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self.repeats, self.write = repeats, write
        self.rows: list[dict[str, Any]] = []

    def add(
        self,
        what: str,
        shape: str,
        make: Callable[[], Callable[[], object]],
        *,
        num_bytes: int = 0,
        flops: int = 0,
    ) -> None:
        """Time what ``make`` returns; a peer that cannot run here is said and left."""
        try:
            median, p20, p80 = bench(make(), self.repeats)
        except Exception as error:
            if what.startswith("sink"):
                raise
            print(f"{what}, {shape}: not timed, {type(error).__name__}: {error}")
            return
        row = {
            "what": what,
            "shape": shape,
            "median_ms": round(median, 5),
            "p20_ms": round(p20, 5),
            "p80_ms": round(p80, 5),
            "gbps": round(num_bytes / median / 1e6, 1),
            "tflops": round(flops / median / 1e9, 2),
        }
        self.rows.append(row)
        if self.write is not None:
            self.write(row)
        print(*row.values(), sep="  ", flush=True)

    def add_peers(self, shape: str, x: Paged, window: int, **work: int) -> None:
        """vLLM's kernels on the cache of ``x`` with a window (0: all keys)."""
        keys = "window only" if window else "all keys"
        for name, peer in PEERS.items():
            self.add(
                f"{name}, {keys}",
                shape,
                lambda peer=peer: graphed(peer(x, window)),
                **work,
            )


def settings(num_positions: int) -> dict[str, Any]:
    """What the launchers want beside the tensors."""
    table = rope_table(num_positions, HEAD_SIZE, DTYPE)
    return {"scale": HEAD_SIZE**-0.5, "cos_sin_cache": table}


def decode_call(x: Paged, busy_heads: float, **kw: Any) -> Callable[[], object]:
    """One step of decode with its workspace, as a graph."""
    cores = launch_config.num_cores(x.q.device)
    space = torch.empty(
        workspace_shape(x.q.shape[1], HEAD_SIZE, busy_heads, cores), device=DEVICE
    )
    out = torch.empty_like(x.q)
    return graphed(lambda: run_decode(x, out, space, **kw))


def attended(num_tokens: int, budget: int) -> int:
    """Pairs of query and key of a whole prompt."""
    short = min(num_tokens, budget)
    return short * (short + 1) // 2 + (num_tokens - short) * budget


def time_decode(table: Table, policies: list[tuple[int, int, int]]) -> None:
    for batch, sinks, window in policies:
        n = 4 * (sinks + window)
        once = [n] * batch, [1] * batch
        x = paged(*once, heads=HEADS, sinks=sinks, window=window, **LAYOUT)
        kw = settings(n)
        shape = f"decode, batch {batch}, {n} tokens, {sinks}+{window}, {MODEL}"
        token = 2 * batch * HEADS[1] * HEAD_SIZE * DTYPE.itemsize
        bounded = {"num_bytes": (sinks + window) * token}

        def ours(x=x, kw=kw):
            return decode_call(x, HEADS[1], **kw)

        def window_only(x=x, kw=kw):
            plain = {"num_sink_tokens": 0, "cos_sin_cache": None}
            return decode_call(x, HEADS[1], **(kw | plain))

        table.add("sink_decode", shape, ours, **bounded)
        table.add("sink_decode, window only", shape, window_only, **bounded)
        table.add_peers(shape, x, window, **bounded)
        table.add(
            "torch sdpa, retained keys laid out densely",
            shape,
            lambda batch=batch, k=sinks + window: graphed(sdpa(1, batch, k)),
            **bounded,
        )
        x = paged(*once, heads=HEADS, sinks=0, window=n, **LAYOUT)
        table.add_peers(shape, x, 0, num_bytes=n * token)
        del x


def retrieval_policies(num_retrieval: int, num_tokens: int) -> list[tuple[int, int]]:
    everything = 0, num_tokens
    return [everything] * num_retrieval + [RETRIEVAL_POLICY] * (
        HEADS[1] - num_retrieval
    )


def time_retrieval(table: Table) -> None:
    """A layer with heads of two kinds: by how many keep everything."""
    group = HEADS[0] // HEADS[1]
    batch, n = RETRIEVAL_DECODE
    long = RETRIEVAL_PROMPT
    for share, count in RETRIEVAL.items():
        policies = retrieval_policies(count, n)
        kept = sum(min(n, s + w) for s, w in policies)
        x, _ = paged_heads([n] * batch, [1] * batch, policies, group=group, **LAYOUT)
        kw = settings(n)
        table.add(
            f"sink_decode, {share} of the heads keep everything",
            f"decode, batch {batch}, {n} tokens, "
            f"{'+'.join(map(str, RETRIEVAL_POLICY))}, {MODEL}",
            lambda x=x, kw=kw: decode_call(x, 1, **kw),
            num_bytes=2 * batch * kept * HEAD_SIZE * DTYPE.itemsize,
        )
        del x
        policies = retrieval_policies(count, long)
        pairs = sum(attended(long, s + w) for s, w in policies)
        x, _ = paged_heads([long], [long], policies, group=group, **LAYOUT)
        kw = settings(long)
        out = torch.empty_like(x.q)
        table.add(
            f"sink_prefill, {share} of the heads keep everything",
            f"prompt {long}, {'+'.join(map(str, RETRIEVAL_POLICY))}, {MODEL}",
            lambda x=x, kw=kw, out=out: graphed(lambda: run_prefill(x, out, **kw)),
            flops=4 * pairs * group * HEAD_SIZE,
        )
        del x, out
    x = paged([n] * batch, [1] * batch, heads=HEADS, sinks=0, window=n, **LAYOUT)
    table.add(
        "vllm FA3, all keys",
        f"decode, batch {batch}, {n} tokens, {MODEL}",
        lambda: graphed(flash(x, 0)),
        num_bytes=2 * batch * n * HEADS[1] * HEAD_SIZE * DTYPE.itemsize,
    )
    x = paged([long], [long], heads=HEADS, sinks=0, window=long, **LAYOUT)
    table.add(
        "vllm FA3, all keys",
        f"prompt {long}, {MODEL}",
        lambda: graphed(flash(x, 0)),
        flops=4 * attended(long, long) * HEADS[0] * HEAD_SIZE,
    )


def time_prefill(table: Table, prompts: list[tuple[int, int, int]]) -> None:
    for n, sinks, window in prompts:
        x = paged([n], [n], heads=HEADS, sinks=sinks, window=window, **LAYOUT)
        kw = settings(n)
        out = torch.empty_like(x.q)
        shape = f"prompt {n}, {sinks}+{window}, {MODEL}"
        work = 4 * HEADS[0] * HEAD_SIZE
        bounded = {"flops": attended(n, sinks + window) * work}
        table.add(
            "sink_prefill",
            shape,
            lambda x=x, kw=kw, out=out: graphed(lambda: run_prefill(x, out, **kw)),
            **bounded,
        )
        table.add_peers(shape, x, window, **bounded)
        table.add(
            "flex_attention, the policy's mask",
            shape,
            lambda n=n, s=sinks, w=window: graphed(flex(n, s, w)),
            **bounded,
        )
        full = {"flops": attended(n, n) * work}
        table.add_peers(shape, x, 0, **full)
        table.add(
            "torch sdpa, all keys", shape, lambda n=n: graphed(sdpa(n, 1, n)), **full
        )
        del x, out


def time_kernels(quick: bool) -> list[dict[str, Any]]:
    """Rows: what, shape, median_ms, p20_ms, p80_ms, gbps, tflops."""
    table = Table(30 if quick else 100)

    def copy():
        space = torch.empty(2, 1 << 30, dtype=torch.int8, device=DEVICE)
        return lambda: space[0].copy_(space[1])

    def product():
        a, b = torch.randn(2, 8192, 8192, device=DEVICE, dtype=DTYPE)
        return lambda: a @ b

    table.add("copy", "1 GiB", copy, num_bytes=2 << 30)
    table.add("matrix product", "8192^3, bf16", product, flops=2 * 8192**3)
    time_decode(table, POLICIES[:1] if quick else POLICIES)
    time_prefill(table, PROMPTS[:1] if quick else PROMPTS)
    time_retrieval(table)
    return table.rows
