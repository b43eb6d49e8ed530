"""What the launchers pass compiles as the cases do, and once for every batch.

Triton's own way from arguments to a binary, without the launch: no GPU is needed.
"""

import pytest
import torch
from triton.runtime import driver
from vllm_sink_kernels.triton import (
    cache_write,
    checks,
    decode,
    launch_config,
    prefill,
    window,
)
from vllm_sink_kernels.triton.arguments import AttentionArgs
from vllm_sink_kernels.triton.head_table import HeadTable

from tests.kernels_aot.compile_kernels import TARGETS, Case, argument_types, source

NUM_TOKENS, BUDGET = 9, (4, 4092)
CASES = [
    Case("", "sm_90", 128, (32, 8), BUDGET),
    Case("", "sm_90", 128, (32, 8), BUDGET, "fp8", soft_cap=True, sink_logits=True),
    Case("", "sm_90", 128, (32, 8), BUDGET, mixed=True),
]


class NoDriver:
    """As much of a driver as compilation asks for."""

    def get_current_target(self):
        return TARGETS["sm_90"][0]

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def launched(monkeypatch):
    """The binary of each launch, by the kernel's name."""
    binaries: dict[str, list] = {}

    class Compiled:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **kw):
                binary = self.kernel.warmup(*args, grid=grid, **kw)
                binaries.setdefault(self.kernel.__name__, []).append(binary)

            return launch

    for module, name in (
        (cache_write, "write_kv_cache_kernel"),
        (decode, "sink_decode_kernel"),
        (prefill, "sink_prefill_kernel"),
        (window, "window_view_kernel"),
        (window, "add_sinks_kernel"),
    ):
        monkeypatch.setattr(module, name, Compiled(getattr(module, name)))
    monkeypatch.setattr(decode, "merge_splits", lambda *args, **kw: None)
    monkeypatch.setattr(checks, "INTERPRETED", True)  # there is no device to ask for
    monkeypatch.setattr(launch_config, "target_of", lambda device: "sm_90")
    monkeypatch.setattr(launch_config, "num_cores", lambda device: 132)
    monkeypatch.setattr(driver, "_active", NoDriver())
    return binaries


def layer_of(case: Case) -> AttentionArgs:
    """The case's layer in vLLM's layout, K and V side by side."""
    (num_heads, num_kv_heads), d = case.heads, case.head_size
    dtype = torch.float8_e4m3fn if case.kv == "fp8" else torch.bfloat16
    cache = torch.zeros(3, num_kv_heads, 16, 2 * d, dtype=torch.bfloat16).to(dtype)
    k_cache, v_cache = cache.transpose(1, 2).split(d, dim=-1)
    table = torch.zeros(32, 32, dtype=torch.int32)
    heads = None
    if case.mixed:
        caches = [
            [x[:, :, i : i + 1] for i in range(num_kv_heads)]
            for x in (k_cache, v_cache)
        ]
        slots = torch.zeros(NUM_TOKENS, dtype=torch.int64)
        many = [table] * num_kv_heads, [slots] * num_kv_heads
        heads = HeadTable.build(*caches, *many, [case.budget] * num_kv_heads)
        k_cache, v_cache = heads.k_cache, heads.v_cache
    q = torch.zeros(NUM_TOKENS, num_heads, d, dtype=torch.bfloat16)
    return AttentionArgs(
        q,
        k_cache,
        v_cache,
        table,
        torch.zeros_like(q),
        d**-0.5,
        *case.budget,
        torch.zeros(64, d, dtype=torch.bfloat16),
        soft_cap=20.0 * case.soft_cap,
        sink_logits=q[0, :, 0].contiguous() if case.sink_logits else None,
        k_scale=torch.ones(1) if case.kv == "fp8" else 1.0,
        v_scale=torch.ones(1) if case.kv == "fp8" else 1.0,
        heads=heads,
    )


def flash(q, k, v, *, out, **kw):
    return out, torch.zeros(q.shape[1], q.shape[0])


def types_of(signature: dict) -> dict:
    """The types of a kernel's arguments, whatever the classes of its tuples."""
    return {k: tuple(x) if isinstance(x, tuple) else x for k, x in signature.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_launchers_pass_what_the_cases_are_compiled_for(launched, case):
    args = layer_of(case)
    ints = {"dtype": torch.int32}
    starts = torch.arange(0, 33, **ints)
    lens = torch.full((32,), 40, **ints)
    decode.sink_decode(args, lens[:NUM_TOKENS], lens[:NUM_TOKENS])
    kv = args.q[:, : args.num_kv_heads]
    slots = torch.zeros(NUM_TOKENS, dtype=torch.int64)
    scales = (args.k_scale, args.v_scale) if case.kv == "fp8" else (None, None)
    cache_write.write_kv_cache(
        kv, kv, args.k_cache, args.v_cache, slots, *scales, heads=args.heads
    )
    first = (0, 1, 16)  # numbers that Triton makes constants of, if it may
    for i in first:
        prefill.sink_prefill(args, starts, lens, first_request=i, first_token=i % 9)
    if case == CASES[0]:
        served = window.WindowPrefill(args, flash)
        for i in first:
            view = served.view(args.block_table, starts, lens, 1, 5000, i, i % 9)
            served(args.pointers(), view, starts, lens, NUM_TOKENS, i, i % 9)
    for kernel, binaries in launched.items():
        assert len({binary.hash for binary in binaries}) == 1, kernel
    for kernel in (
        decode.sink_decode_kernel.kernel,
        prefill.sink_prefill_kernel.kernel,
    ):
        constants = dict.fromkeys(name for name in kernel.arg_names if name.isupper())
        want = source(kernel, constants, argument_types(case)).signature
        assert types_of(launched[kernel.__name__][0].src.signature) == types_of(want)
