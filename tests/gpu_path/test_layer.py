"""A layer in a step: exact cache and outputs, no trace of padding or gap.

Unwritten slots, the null block and the gap hold NaN, gap blocks have ids far out
of range; so have all blocks of padding requests, and padding tokens are NaN.
"""

from types import SimpleNamespace

import pytest
import torch

from tests.gpu_path.steps import (
    SINKS,
    WINDOW,
    LayerInputs,
    Step,
    make_batch,
    make_builder,
    make_impl,
)
from tests.kernels.batches import assert_close

DECODE = {"seq_lens": (70, 9, 33), "query_lens": (1, 1, 1)}
VERIFY = {"seq_lens": (70, 9, 50), "query_lens": (3, 1, 2)}
MIXED = {"seq_lens": (70, 9, 50), "query_lens": (1, 1, 20)}
UNIT = SimpleNamespace()  # a layer without scales


def forward(impl, inputs: LayerInputs, plan, layer=UNIT) -> torch.Tensor:
    return impl.forward(
        layer,
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.cache,
        plan,
        inputs.output,
    )


def check(batch, inputs: LayerInputs, out: torch.Tensor, **kw) -> None:
    n = len(batch.q)
    assert_close(batch, out[:n], **kw)
    assert (out[n:] == 0).all()
    inputs.assert_cache_is_exact()


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("shape", [DECODE, MIXED], ids=["decode", "mixed"])
def test_step(monkeypatch, shape, padding):
    batch = make_batch(sinks=SINKS, window=WINDOW, **shape)
    impl = make_impl(batch)
    builder = make_builder(
        monkeypatch, impl, cos_sin_cache=batch.kw["cos_sin_cache"], block_size=16
    )
    step = Step.of(batch, padding, padding)
    inputs = LayerInputs(batch, step.num_tokens)
    check(batch, inputs, forward(impl, inputs, builder.build(0, step.common())))


@pytest.mark.parametrize(
    "shape,max_query_len",
    [(DECODE, 3), (VERIFY, 3), (MIXED, None), (DECODE, None)],
    ids=["decode", "verify", "mixed", "decode in a mixed graph"],
)
def test_a_captured_plan_replays_other_batches(monkeypatch, shape, max_query_len):
    """As a CUDA graph does: the plan of a dummy batch, the tensors of a later one."""
    batch = make_batch(sinks=SINKS, window=WINDOW, **shape)
    impl = make_impl(batch)
    builder = make_builder(
        monkeypatch,
        impl,
        cos_sin_cache=batch.kw["cos_sin_cache"],
        num_speculative_tokens=2,
    )
    step = Step(len(batch.q) + 5, len(batch.seq_lens) + 2, batch.block_table.shape[1])
    step.fill_dummy(max_query_len or step.num_tokens)
    captured = builder.build_for_cudagraph_capture(step.common())
    assert captured.num_decode_tokens == (step.num_tokens if max_query_len else 0)
    step.fill(batch)
    builder.build(0, step.common())
    inputs = LayerInputs(batch, step.num_tokens)
    check(batch, inputs, forward(impl, inputs, captured))


def test_fp8_cache_with_the_layers_scales(monkeypatch):
    batch = make_batch(
        sinks=SINKS,
        window=WINDOW,
        kv_dtype=torch.float8_e4m3fn,
        k_scale=0.5,
        v_scale=0.5,
        **MIXED,
    )
    impl = make_impl(batch, kv_cache_dtype="fp8")
    builder = make_builder(monkeypatch, impl, cos_sin_cache=batch.kw["cos_sin_cache"])
    step = Step.of(batch, 2, 1)
    inputs = LayerInputs(batch, step.num_tokens, scale=0.5)
    inputs.cache = inputs.cache.view(torch.uint8)  # as vLLM allocates it
    layer = SimpleNamespace(_k_scale=torch.tensor(0.5), _v_scale=torch.tensor(0.5))
    out = forward(impl, inputs, builder.build(0, step.common()), layer)
    check(batch, inputs, out)


def test_sliding_window_layer_has_no_sinks(monkeypatch):
    batch = make_batch(sinks=0, window=WINDOW, turn=False, **MIXED)
    impl = make_impl(batch, sliding_window=WINDOW)
    builder = make_builder(monkeypatch, impl, sliding_window=WINDOW)
    step = Step.of(batch, 2, 1)
    inputs = LayerInputs(batch, step.num_tokens)
    check(batch, inputs, forward(impl, inputs, builder.build(0, step.common())))


def test_soft_cap_and_sink_logits(monkeypatch):
    logits = torch.randn(4)
    batch = make_batch(
        sinks=SINKS, window=WINDOW, soft_cap=5.0, sink_logits=logits, **MIXED
    )
    impl = make_impl(batch, logits_soft_cap=5.0, sinks=logits)
    builder = make_builder(monkeypatch, impl, cos_sin_cache=batch.kw["cos_sin_cache"])
    step = Step.of(batch)
    inputs = LayerInputs(batch, step.num_tokens)
    check(batch, inputs, forward(impl, inputs, builder.build(0, step.common())))


def test_a_layer_that_shares_anothers_cache_does_not_write(monkeypatch):
    batch = make_batch(sinks=SINKS, window=WINDOW, **DECODE)
    impl = make_impl(batch, kv_sharing_target_layer_name="other")
    builder = make_builder(monkeypatch, impl, cos_sin_cache=batch.kw["cos_sin_cache"])
    step = Step.of(batch)
    inputs = LayerInputs(batch, step.num_tokens)
    inputs.cache = inputs.expected_cache.clone()
    inputs.key.fill_(7.0)
    inputs.value.fill_(7.0)
    check(batch, inputs, forward(impl, inputs, builder.build(0, step.common())))


def test_profiling_and_fused_quantization(monkeypatch):
    batch = make_batch(sinks=SINKS, window=WINDOW, **DECODE)
    impl = make_impl(batch)
    inputs = LayerInputs(batch, len(batch.q))
    assert (forward(impl, inputs, None) == 0).all()
    with pytest.raises(ValueError, match="output quantization must not be fused"):
        impl.forward(
            UNIT,
            inputs.query,
            inputs.key,
            inputs.value,
            inputs.cache,
            None,
            inputs.output,
            output_scale=torch.ones(1),
        )
