"""Python time of the GPU path in one layer, its kernels stubbed: no GPU is needed.

    TRITON_INTERPRET=1 python -m benchmarks.gpu_layer

What is measured is this project's: from ``forward`` to where Triton would take over.
Prints microseconds a layer, median (p20, p80) of many steps, for a step of decodes and
for one with a prefill.
"""

import os
import statistics
import time
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from vllm_sink_kernels.triton import cache_write, decode, merge, prefill

from tests.gpu_path.steps import (
    SINKS,
    WINDOW,
    LayerInputs,
    Step,
    make_batch,
    make_builder,
    make_impl,
)

REPEATS = 2000
STEPS = {
    "decode": {"seq_lens": (70, 9, 33), "query_lens": (1, 1, 1)},
    "mixed": {"seq_lens": (70, 9, 50), "query_lens": (1, 1, 20)},
}


class Stub:
    """A kernel that does nothing."""

    def __init__(self, kernel):
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def microseconds(run) -> str:
    for _ in range(100):
        run()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e6)
    low, *_, high = statistics.quantiles(times, n=5)
    return f"{statistics.median(times):6.1f} ({low:.1f}, {high:.1f})"


def main() -> None:
    torch.set_num_threads(1)
    patches = pytest.MonkeyPatch()
    for module, name in (
        (decode, "sink_decode_kernel"),
        (merge, "merge_splits_kernel"),
        (prefill, "sink_prefill_kernel"),
        (cache_write, "write_kv_cache_kernel"),
    ):
        patches.setattr(module, name, Stub(getattr(module, name)))
    for kind, shape in STEPS.items():
        batch = make_batch(sinks=SINKS, window=WINDOW, **shape)
        impl = make_impl(batch)
        builder = make_builder(patches, impl, cos_sin_cache=batch.kw["cos_sin_cache"])
        step = Step.of(batch)
        inputs = LayerInputs(batch, step.num_tokens)
        plan = builder.build(0, step.common())
        layer = SimpleNamespace()

        def forward(impl=impl, layer=layer, inputs=inputs, plan=plan):
            impl.forward(
                layer,
                inputs.query,
                inputs.key,
                inputs.value,
                inputs.cache,
                plan,
                inputs.output,
            )

        print(f"{kind:7} microseconds a layer: {microseconds(forward)}")
    patches.undo()


if __name__ == "__main__":
    main()
