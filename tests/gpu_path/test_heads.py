"""KV heads of two kinds through the GPU path, and what the CPU path gives for them."""

import pytest
import torch
from serving import SINKS, WINDOW, serve

# [layers][KV heads]: both layers mixed, in different places.
HEADS = {"retrieval_heads": [[1, 0], [0, 1]]}
WINDOWED = HEADS | {"retrieval_window_size": 50}
WHOLE_LAYERS = {"retrieval_layers": [1]}


@pytest.mark.parametrize("retrieval", [HEADS, WINDOWED, WHOLE_LAYERS])
def test_tokens_and_logprobs_of_the_cpu_path(
    model, prompts, calls, monkeypatch, retrieval
):
    from vllm_sink.attention import gpu

    tables, build = [], gpu.HeadTable.build

    def record(*args):
        tables.append(build(*args))
        return tables[-1]

    monkeypatch.setattr(gpu.HeadTable, "build", record)
    kw = {"retrieval": retrieval, "block_size": 16}
    want = serve(model, prompts, interpreted=False, **kw)
    calls.clear()
    tokens, logprobs = serve(model, prompts, interpreted=True, **kw)
    assert tokens == want[0]
    torch.testing.assert_close(logprobs, want[1], rtol=0, atol=1e-3)
    # One write and at most one launch of each kernel a layer, whatever the mix.
    assert set(calls) == {"decode", "prefill", "write"}
    assert "write decode prefill write" in " ".join(calls)
    # A layer's table is made once, not in every step.
    assert len(tables) == (0 if retrieval is WHOLE_LAYERS else 2)
    longest = max(len(run) for run in "".join(c[0] for c in calls).split("w"))
    assert longest == 2


@pytest.mark.parametrize("mistake", ["policies", "block tables", "turn"])
def test_a_mistake_in_one_head_shows(model, prompts, monkeypatch, mistake):
    from vllm_sink.attention import gpu

    kw = {"retrieval": WINDOWED, "block_size": 16}
    want = serve(model, prompts[1:], interpreted=False, **kw)[1]
    build, arguments = gpu.HeadTable.build, gpu.AttentionArgs

    def mistaken(k_caches, v_caches, block_tables, slot_mappings, policies):
        if mistake == "policies":
            policies = policies[::-1]
        elif mistake == "block tables":
            block_tables = block_tables[::-1]
        return build(k_caches, v_caches, block_tables, slot_mappings, policies)

    def without_turn(**kwargs):
        return arguments(**kwargs | {"cos_sin_cache": None})

    monkeypatch.setattr(gpu.HeadTable, "build", mistaken)
    if mistake == "turn":
        monkeypatch.setattr(gpu, "AttentionArgs", without_turn)
    got = serve(model, prompts[1:], interpreted=True, **kw)[1]
    difference = (got - want).abs()
    if mistake != "block tables":  # they may differ from the first block on
        assert difference[: SINKS + WINDOW - 1].max() < 1e-3
    assert not (difference[SINKS + WINDOW :].max() < 1e-2)  # NaN is noticed, too
