#!/usr/bin/env python3
"""Check and time the kernels on a GPU: torch and Triton are all it needs.

    python scripts/gpu_check.py              # correctness, then times, then the CSV
    python scripts/gpu_check.py --quick      # a corner of the matrix, short timing
    python scripts/gpu_check.py --interpret --quick   # no GPU: correctness only

Correctness runs decode, prefill and cache write against ``reference`` (error at
most twice that of the reference run in the kernel's precision). Times are medians
with p20 and p80, L2 cold, against (a) a device-to-device copy, the bandwidth
ceiling, (b) torch SDPA on the retained keys laid out densely, and for prefill
FlexAttention with the same mask, (c) vLLM's ``unified_attention`` at the same
window where vLLM is importable. The CSV names GPU, driver, torch, Triton, commit.
There the engine is checked, too: see ``engine_check.py``.
"""

import argparse
import csv
import importlib.util
import itertools
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if "--interpret" in sys.argv:  # before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(ROOT / "kernels"))

import torch  # noqa: E402
import triton  # noqa: E402
from vllm_sink_kernels import reference  # noqa: E402
from vllm_sink_kernels.triton import launch_config  # noqa: E402
from vllm_sink_kernels.triton.cache_write import write_kv_cache  # noqa: E402
from vllm_sink_kernels.triton.decode import sink_decode, workspace_shape  # noqa: E402
from vllm_sink_kernels.triton.prefill import sink_prefill  # noqa: E402

FP8 = torch.float8_e4m3fn
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRET else "cuda"


def rope_table(num_rows, rot_dim, dtype):
    freqs = 1e4 ** (-torch.arange(0, rot_dim, 2, dtype=torch.float64) / rot_dim)
    angles = torch.arange(num_rows, dtype=torch.float64)[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], 1).to(DEVICE, dtype)


def paged(seq_lens, query_lens, *, heads, d, block, sinks, window, dtype, kv_dtype):
    """A step's tensors: NaN where nothing is retained, stale ids in the gap."""
    num_heads, num_kv_heads = heads
    tables, slots = [], []
    spare = itertools.count(1)
    width = max(-(-n // block) for n in seq_lens)
    for n, m in zip(seq_lens, query_lens, strict=True):
        first = min(n, max(sinks, n - m - window + 1))
        keys = torch.cat([torch.arange(min(sinks, n)), torch.arange(first, n)])
        row = torch.full((width,), 2**31 - 1, dtype=torch.int32)
        for i in (keys // block).unique().tolist():
            row[i] = next(spare)
        tables.append(row)
        slots.append(row[keys // block].long() * block + keys % block)
    slots = torch.cat(slots).to(DEVICE)
    num_blocks = next(spare)
    order = torch.cat([torch.zeros(1).long(), torch.randperm(num_blocks - 1) + 1])
    table = torch.stack(tables)
    known = table < num_blocks
    table[known] = order[table[known].long()].int()
    slots = order.to(DEVICE)[slots // block] * block + slots % block
    caches = []
    for _ in "kv":
        cache = torch.full(
            (num_blocks, block, num_kv_heads, d), torch.nan, device=DEVICE, dtype=dtype
        )
        cache.view(-1, num_kv_heads, d)[slots] = torch.randn(
            len(slots), num_kv_heads, d, device=DEVICE, dtype=dtype
        )
        caches.append(cache.to(kv_dtype or dtype))
    q = torch.randn(sum(query_lens), num_heads, d, device=DEVICE, dtype=dtype)
    starts = torch.tensor([0, *query_lens]).cumsum(0).int().to(DEVICE)
    lens = torch.tensor(seq_lens).int().to(DEVICE)
    at = [torch.arange(n - m, n) for n, m in zip(seq_lens, query_lens, strict=True)]
    counts = torch.tensor(query_lens)
    rows = torch.arange(len(counts)).repeat_interleave(counts).int().to(DEVICE)
    return {
        "paged": (q, *caches, table.to(DEVICE)),
        "starts": starts,
        "lens": lens,
        "positions": torch.cat(at).int().to(DEVICE),
        "requests": rows,
        "max_query_len": max(query_lens),
    }


def run_decode(x, kw, out, workspace=None):
    return sink_decode(
        *x["paged"], x["positions"], x["requests"], out, workspace=workspace, **kw
    )


def run_prefill(x, kw, out):
    return sink_prefill(
        *x["paged"], x["starts"], x["lens"], x["max_query_len"], out, **kw
    )


def matrix(quick):
    """Cases: one default, each property varied in turn, groups with every dtype."""
    base = {
        "heads": (8, 2),
        "d": 64,
        "block": 16,
        "sinks": 4,
        "window": 60,
        "dtype": torch.float16 if INTERPRET else torch.bfloat16,
        "kv_dtype": None,
        "rot": 1.0,
        "is_neox": True,
        "soft_cap": 0.0,
        "logits": False,
    }
    vary = {
        "d": [80, 96, 128, 256],
        "block": [32, 48, 64, 128],
        "sinks": [0, 1, 64, 150],
        "window": [1, 700, 2000],
        "rot": [0.0, 0.5],
        "is_neox": [False],
        "soft_cap": [20.0],
        "logits": [True],
        "kv_dtype": [FP8],
    }
    # bf16 gives garbage in the interpreter of Triton 3.9: fp16 and fp32 there.
    dtypes = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRET)
    groups = [(4, 4), (8, 2), (5, 1), (9, 3)]
    yield from (
        base | {"heads": h, "dtype": t} for h, t in itertools.product(groups, dtypes)
    )
    for name, values in vary.items():
        for value in values[:1] if quick else values:
            yield base | {name: value}
            if not quick:
                big = {"heads": (32, 8), "d": 128, "window": 1020, name: value}
                yield base | big


def check_attention(case):
    """Largest error as a share of what the case may have; NaN counts as infinite."""
    c = dict(case)
    rot, neox = c.pop("rot"), c.pop("is_neox")
    cap, logits = c.pop("soft_cap"), c.pop("logits")
    d, w, s = c["d"], c["window"], c["sinks"]
    seq_lens = [1, 3, 15, 17, s + w - 1, s + w, s + w + 1, s + 2 * w + 90]
    query_lens = [1, 2, 1, 1, 1, min(3, s + w), 1, 40 if not INTERPRET else 5]
    seq_lens = [max(n, m) for n, m in zip(seq_lens, query_lens, strict=True)]
    x = paged(seq_lens, query_lens, **c)
    fp8 = c["kv_dtype"] is not None
    kw = {
        "scale": d**-0.5,
        "num_sink_tokens": s,
        "window_size": w,
        "is_neox": neox,
        "soft_cap": cap,
        "k_scale": 0.5 if fp8 else 1.0,
        "v_scale": 1.75 if fp8 else 1.0,
    }
    if rot:
        rot_dim = int(d * rot) // 2 * 2
        kw["cos_sin_cache"] = rope_table(max(seq_lens), rot_dim, c["dtype"])
    if logits:
        kw["sink_logits"] = torch.randn(c["heads"][0], device=DEVICE)
    args = (*x["paged"], x["starts"], x["lens"])
    want = reference.sink_attention(*args, **kw, compute_dtype=torch.float64).double()
    low = reference.sink_attention(*args, **kw, compute_dtype=c["dtype"]).double()
    floor = 8 * torch.finfo(c["dtype"]).eps * max(1.0, want.abs().max().item())
    limit = 2 * (low - want).abs().max().item() + floor
    worst = 0.0
    for run in (run_decode, run_prefill):
        out = run(x, kw, torch.full_like(x["paged"][0], torch.nan)).double()
        error = (out - want).abs().nan_to_num(torch.inf).max().item()
        worst = max(worst, error / limit)
    return worst


def check_cache_write(kv_dtype):
    """Written bytes against torch's own conversion (ties to even)."""
    k, v = torch.randn(2, 9, 3, 80, device=DEVICE, dtype=torch.float32).half() * 9
    if INTERPRET:  # its fp8 rounding is not the hardware's: exact values only
        k, v = (x.clamp(-15, 15).round() for x in (k, v))
    caches = [torch.zeros(4, 16, 3, 80, device=DEVICE).to(kv_dtype) for _ in "kv"]
    want = [c.float() for c in caches]
    slots = torch.tensor([0, 5, -1, 63, 17, 18, -1, 40, 33], device=DEVICE)
    keep = slots >= 0
    for w, x, scale in zip(want, (k, v), (0.5, 2.0), strict=True):
        x = x.float() / scale if kv_dtype == FP8 else x.float()
        w.view(-1, 3, 80)[slots[keep]] = x[keep].to(kv_dtype).float()
    write_kv_cache(k, v, *caches, slots, 0.5, torch.tensor([2.0], device=DEVICE))
    return all(torch.equal(c.float(), w) for c, w in zip(caches, want, strict=True))


def correctness(quick):
    failed = total = 0
    fp8_runs = INTERPRET or torch.version.hip is not None
    fp8_runs = fp8_runs or torch.cuda.get_device_capability() >= (8, 9)
    for case in matrix(quick):
        if case["kv_dtype"] == FP8 and not fp8_runs:
            continue
        ratio = check_attention(case)
        total += 1
        if ratio > 1:
            failed += 1
            print(f"FAILED, error {ratio:.2f} times the limit: {case}")
    for kv_dtype in [torch.float16] + [FP8] * fp8_runs:
        total += 1
        if not check_cache_write(kv_dtype):
            failed += 1
            print(f"FAILED, cache write to {kv_dtype}")
    print(f"correctness: {total} cases, {failed} failed")
    return failed


def engine():
    """Failures of the whole engine, checked in a process of its own."""
    missing = [m for m in ("vllm", "vllm_sink") if importlib.util.find_spec(m) is None]
    if missing:
        print(f"engine: not checked, {missing[0]} can't be imported here")
        return 0
    command = [sys.executable, ROOT / "scripts/engine_check.py"]
    sys.stdout.flush()
    return subprocess.run(command + ["--interpret"] * INTERPRET).returncode


def bench(fn, repeats):
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


def graphed(fn):
    """``fn`` as one CUDA graph, so that launch overhead is not timed."""
    for _ in range(3):
        fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


def unified(x, kw, out, window):
    """vLLM's kernel on the same cache with the window alone, or None without vLLM."""
    try:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    except Exception as error:  # no vLLM, or one that cannot be imported here
        print(f"vLLM's unified_attention is not timed: {error}")
        return None
    q, k, v, table = x["paged"]
    longest = int(x["lens"].max())
    scales = torch.ones(len(x["lens"]), k.shape[2], device=DEVICE)
    # Enough for its split decode: 16 segments, as vLLM's backend allocates them.
    segments, d = 16, triton.next_power_of_2(q.shape[2])
    shape = (len(q), q.shape[1], segments)
    part = torch.empty(*shape, d, device=DEVICE)
    top, total = torch.empty(shape, device=DEVICE), torch.empty(shape, device=DEVICE)
    return lambda: unified_attention(
        q=q,
        k=k,
        v=v,
        out=out,
        cu_seqlens_q=x["starts"],
        max_seqlen_q=x["max_query_len"],
        seqused_k=x["lens"],
        max_seqlen_k=longest,
        softmax_scale=kw["scale"],
        causal=True,
        window_size=(window - 1, 0),
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


def time_kernels(quick):
    """Rows of times; ``gbps`` counts each retained K and V once."""
    repeats = 30 if quick else 200
    rows = []

    def add(what, shape, fn, num_bytes=0, flops=0):
        if fn is None:
            return
        try:
            median, p20, p80 = bench(fn, repeats)
        except Exception as error:  # a baseline that this machine cannot run
            print(f"{what} {shape}: not timed, {type(error).__name__}: {error}")
            return
        rows.append(
            {
                "what": what,
                "shape": shape,
                "median_ms": round(median, 5),
                "p20_ms": round(p20, 5),
                "p80_ms": round(p80, 5),
                "gbps": round(num_bytes / median / 1e6, 1),
                "tflops": round(flops / median / 1e9, 2),
            }
        )
        print(rows[-1], flush=True)

    space = torch.empty(2, 1 << 30, dtype=torch.int8, device=DEVICE)
    add("copy", "1 GiB", lambda space=space: space[0].copy_(space[1]), 2 << 30)
    del space
    hq, hkv, d, block = 32, 8, 128, 16
    dtype = torch.bfloat16
    for batch, sinks, window in [(64, 4, 4092), (1, 4, 4092), (64, 4, 1020)]:
        n = 4 * (sinks + window)
        x = paged(
            [n] * batch,
            [1] * batch,
            heads=(hq, hkv),
            d=d,
            block=block,
            sinks=sinks,
            window=window,
            dtype=dtype,
            kv_dtype=None,
        )
        q = x["paged"][0]
        kw = {"scale": d**-0.5, "num_sink_tokens": sinks, "window_size": window}
        kw["cos_sin_cache"] = rope_table(n, d, dtype)
        out = torch.empty_like(q)
        cores = launch_config.num_cores(q.device)
        space = torch.empty(workspace_shape(hq, d, hkv, cores), device=DEVICE)
        shape = f"batch {batch}, {sinks}+{window}, {hq}/{hkv} heads, d {d}, bf16"
        num_bytes = 2 * batch * (sinks + window) * hkv * d * 2
        add(
            "sink_decode",
            shape,
            graphed(lambda x=x, kw=kw, out=out, s=space: run_decode(x, kw, out, s)),
            num_bytes,
        )
        only = kw | {"num_sink_tokens": 0, "window_size": window, "cos_sin_cache": None}
        add(
            "sink_decode, window only",
            shape,
            graphed(lambda x=x, kw=only, out=out, s=space: run_decode(x, kw, out, s)),
            num_bytes,
        )
        other = unified(x, kw, torch.empty_like(q), window)
        if other is not None:
            try:
                other = graphed(other)
            except Exception as error:
                print(f"unified_attention does not run here: {error}")
                other = None
        add("vllm unified_attention, window only", shape, other, num_bytes)
        dense = torch.randn(
            2, batch, hkv, sinks + window, d, device=DEVICE, dtype=dtype
        )
        ask = q.view(batch, hq, 1, d)
        add(
            "torch sdpa, dense keys",
            shape,
            lambda ask=ask, kv=dense: torch.nn.functional.scaled_dot_product_attention(
                ask, kv[0], kv[1], enable_gqa=True
            ),
            num_bytes,
        )
        del dense, x
    for n, sinks, window in [(8192, 4, 2044)] + [(32768, 4, 4092)] * (not quick):
        x = paged(
            [n],
            [n],
            heads=(hq, hkv),
            d=d,
            block=block,
            sinks=sinks,
            window=window,
            dtype=dtype,
            kv_dtype=None,
        )
        q = x["paged"][0]
        kw = {"scale": d**-0.5, "num_sink_tokens": sinks, "window_size": window}
        kw["cos_sin_cache"] = rope_table(n, d, dtype)
        out = torch.empty_like(q)
        shape = f"prompt {n}, {sinks}+{window}, {hq}/{hkv} heads, d {d}, bf16"
        pairs = sum(min(p + 1, sinks + window) for p in range(n))
        flops = 4 * pairs * hq * d
        add(
            "sink_prefill",
            shape,
            lambda x=x, k=kw, o=out: run_prefill(x, k, o),
            0,
            flops,
        )
        other = unified(x, kw, torch.empty_like(q), window)
        add("vllm unified_attention, window only", shape, other, 0, flops)
        add(
            "flex_attention", shape, flex(n, sinks, window, hq, hkv, d, dtype), 0, flops
        )
        ask = torch.randn(1, hq, n, d, device=DEVICE, dtype=dtype)
        kv = torch.randn(2, 1, hkv, n, d, device=DEVICE, dtype=dtype)
        add(
            "torch sdpa, causal over all keys",
            shape,
            lambda ask=ask, kv=kv: torch.nn.functional.scaled_dot_product_attention(
                ask, kv[0], kv[1], is_causal=True, enable_gqa=True
            ),
        )
    return rows


def flex(n, sinks, window, hq, hkv, d, dtype):
    """FlexAttention with the policy's mask (``absolute`` positions)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def mask(b, h, p, k):
        return (k <= p) & ((k < sinks) | (p - k < window))

    q = torch.randn(1, hq, n, d, device=DEVICE, dtype=dtype)
    kv = torch.randn(2, 1, hkv, n, d, device=DEVICE, dtype=dtype)
    compiled = torch.compile(flex_attention)
    blocks = create_block_mask(mask, None, None, n, n, device=DEVICE)
    return lambda: compiled(q, kv[0], kv[1], block_mask=blocks, enable_gqa=True)


def output_of(*command):
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""
    except OSError:
        return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interpret", action="store_true", help="run without a GPU")
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats")
    parser.add_argument("--out", type=Path, help="the CSV's path")
    args = parser.parse_args()
    if not INTERPRET and not torch.cuda.is_available():
        parser.error("no GPU here: pass --interpret for the correctness part alone")
    torch.manual_seed(0)
    failed = correctness(args.quick) + engine()
    if failed or INTERPRET:
        return int(failed > 0)
    gpu = torch.cuda.get_device_name()
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    machine = {
        "gpu": gpu,
        "driver": torch.version.hip or output_of(*query),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": output_of("git", "rev-parse", "--short", "HEAD"),
    }
    rows = [row | machine for row in time_kernels(args.quick)]
    slug = "-".join(gpu.lower().split())
    path = args.out or ROOT / f"benchmarks/results/gpu_check_{slug}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
