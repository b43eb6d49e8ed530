"""A check of the kernels on a GPU, and their times: it needs torch and Triton alone.

From the repository's root, once ``pip install --no-deps .`` has put the kernels there:

    python -m scripts.gpu_check              # correctness, engine, times, then the CSV
    python -m scripts.gpu_check --quick      # a corner of the matrix, short timing
    python -m scripts.gpu_check --part times
    python -m scripts.gpu_check --part prefill mixes    # every variant
    python -m scripts.gpu_check --interpret --quick   # no GPU: correctness and engine

Correctness runs decode, prefill and cache write against ``reference`` (error at
most twice that of the reference run in the kernel's precision), in as many processes
as ``--jobs``: most of its time is Triton's compiler. Times are medians with p20 and
p80, L2 cold, beside the copy and the matrix product that bound them and beside torch's,
vLLM's and FlashAttention 3's attention (``benchmarks/gpu_kernels.py``), the last two
where vLLM is installed. The CSV names GPU, driver, torch, Triton, commit. There the
engine is checked, too: see ``engine_check.py``.
"""

import argparse
import importlib.util
import itertools
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if "--interpret" in sys.argv:  # before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from vllm_sink_kernels import reference  # noqa: E402
from vllm_sink_kernels.triton.cache_write import write_kv_cache  # noqa: E402

from benchmarks import gpu_mixes, gpu_prefill  # noqa: E402
from benchmarks.gpu_batches import (  # noqa: E402
    DEVICE,
    INTERPRET,
    paged,
    paged_heads,
    rope_table,
)
from benchmarks.gpu_kernels import run_decode, run_prefill, time_kernels  # noqa: E402
from benchmarks.gpu_rows import RowFile  # noqa: E402
from benchmarks.machine import write_gpu_rows  # noqa: E402

PARTS = ("correctness", "engine", "times")
VARIANTS = {"prefill": gpu_prefill, "mixes": gpu_mixes}  # asked for by name alone
FP8 = torch.float8_e4m3fn


def matrix(quick):
    """Cases: one default, each property varied in turn, groups with every dtype."""
    base = {
        "heads": (8, 2),
        "head_size": 64,
        "block_size": 16,
        "sinks": 4,
        "window": 60,
        "dtype": torch.float16 if INTERPRET else torch.bfloat16,
        "kv_dtype": None,
        "rot": 1.0,
        "is_neox": True,
        "soft_cap": 0.0,
        "logits": False,
        "num_retrieval": None,  # heads of two kinds: how many keep everything
    }
    vary = {
        "head_size": [80, 96, 128, 256],
        "block_size": [32, 48, 64, 128],
        "sinks": [0, 1, 64, 150],
        "window": [1, 700, 2000],
        "rot": [0.0, 0.5],
        "is_neox": [False],
        "soft_cap": [20.0],
        "logits": [True],
        "kv_dtype": [FP8],
        "num_retrieval": [1, 0, 2],
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
                big = {"heads": (32, 8), "head_size": 128, "window": 1020, name: value}
                yield base | big
    if not quick:
        for change in ({"logits": True}, {"kv_dtype": FP8}, {"is_neox": False}):
            yield base | {"num_retrieval": 1} | change


def check_attention(case):
    """Largest error as a share of what the case may have; NaN counts as infinite."""
    torch.manual_seed(0)
    c = dict(case)
    rot, neox = c.pop("rot"), c.pop("is_neox")
    cap, logits = c.pop("soft_cap"), c.pop("logits")
    num_retrieval = c.pop("num_retrieval")
    d, w, s = c["head_size"], c["window"], c["sinks"]
    seq_lens = [1, 3, 15, 17, s + w - 1, s + w, s + w + 1, s + 2 * w + 90]
    query_lens = [1, 2, 1, 1, 1, min(3, s + w), 1, 40 if not INTERPRET else 5]
    seq_lens = [max(n, m) for n, m in zip(seq_lens, query_lens, strict=True)]
    num_heads, num_kv_heads = c["heads"]
    if num_retrieval is None:
        x = paged(seq_lens, query_lens, **c)
        parts = [x]
    else:
        for name in ("heads", "sinks", "window"):
            c.pop(name)
        policies = [(0, max(seq_lens))] * num_retrieval
        policies += [(s, w)] * (num_kv_heads - num_retrieval)
        group = num_heads // num_kv_heads
        x, parts = paged_heads(seq_lens, query_lens, policies, group=group, **c)
    fp8 = c["kv_dtype"] is not None
    kw = {
        "scale": d**-0.5,
        "is_neox": neox,
        "soft_cap": cap,
        "k_scale": 0.5 if fp8 else 1.0,
        "v_scale": 1.75 if fp8 else 1.0,
    }
    if rot:
        rot_dim = int(d * rot) // 2 * 2
        kw["cos_sin_cache"] = rope_table(max(seq_lens), rot_dim, c["dtype"])
    sink_logits = torch.randn(num_heads, device=DEVICE) if logits else None

    def expect(dtype):
        own = (
            [None] * len(parts)
            if sink_logits is None
            else sink_logits.chunk(len(parts))
        )
        outputs = [
            reference.sink_attention(
                *part.args,
                part.starts,
                part.lens,
                **(part.kw | kw),
                sink_logits=part_logits,
                compute_dtype=dtype,
            )
            for part, part_logits in zip(parts, own, strict=True)
        ]
        return torch.cat(outputs, dim=1).double()

    want, low = expect(torch.float64), expect(c["dtype"])
    floor = 8 * torch.finfo(c["dtype"]).eps * max(1.0, want.abs().max().item())
    limit = 2 * (low - want).abs().max().item() + floor
    worst = 0.0
    for run in (run_decode, run_prefill):
        out = run(x, torch.full_like(x.q, torch.nan), sink_logits=sink_logits, **kw)
        error = (out.double() - want).abs().nan_to_num(torch.inf).max().item()
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


def verdict(case):
    """What is wrong with a case of ``matrix``, or with a dtype of the cache's write."""
    try:
        if isinstance(case, torch.dtype):
            return None if check_cache_write(case) else f"cache write to {case}"
        ratio = check_attention(case)
        return None if ratio <= 1 else f"error {ratio:.2f} times the limit: {case}"
    except Exception as error:
        return f"{type(error).__name__}: {error}: {case}"


def correctness(quick, jobs):
    fp8_runs = INTERPRET or torch.version.hip is not None
    fp8_runs = fp8_runs or torch.cuda.get_device_capability() >= (8, 9)
    cases = [case for case in matrix(quick) if fp8_runs or case["kv_dtype"] != FP8]
    cases += [torch.float16] + [FP8] * fp8_runs
    if jobs == 1:
        verdicts = map(verdict, cases)
    else:  # spawned: a forked process cannot use CUDA
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            verdicts = list(pool.map(verdict, cases))
    failures = [what for what in verdicts if what is not None]
    for what in failures:
        print(f"FAILED, {what}")
    print(f"correctness: {len(cases)} cases, {len(failures)} failed")
    return len(failures)


def engine():
    """Failures of the whole engine, checked in a process of its own."""
    missing = [m for m in ("vllm", "vllm_sink") if importlib.util.find_spec(m) is None]
    if missing:
        print(f"engine: not checked, {missing[0]} can't be imported here")
        return 0
    command = [sys.executable, "-m", "scripts.engine_check"]
    sys.stdout.flush()
    return subprocess.run(command + ["--interpret"] * INTERPRET, cwd=ROOT).returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interpret", action="store_true", help="run without a GPU")
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats")
    parser.add_argument("--part", nargs="+", choices=[*PARTS, *VARIANTS], default=PARTS)
    parser.add_argument(
        "--jobs",
        type=int,
        default=1 if INTERPRET else min(12, os.cpu_count() or 1),
        help="processes of the correctness part, about 1 GiB of GPU memory each",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the CSV's path, a part's name added for prefill and mixes",
    )
    args = parser.parse_args()
    if not INTERPRET and not torch.cuda.is_available():
        parser.error("no GPU here: pass --interpret for the correctness part alone")
    torch.manual_seed(0)
    failed = correctness(args.quick, args.jobs) if "correctness" in args.part else 0
    if "engine" in args.part:
        failed += engine()
    for part in [part for part in VARIANTS if part in args.part]:
        out = args.out and args.out.with_stem(f"{args.out.stem}_{part}")
        write = None if INTERPRET else RowFile(f"gpu_{part}", out)
        failed += VARIANTS[part].run(write, 30 if args.quick else 100)
    if failed or INTERPRET or "times" not in args.part:
        return int(failed > 0)
    write_gpu_rows(time_kernels(args.quick), "gpu_check", args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
