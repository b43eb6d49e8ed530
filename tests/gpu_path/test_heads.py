"""KV heads of two kinds on the GPU path, against the CPU path."""

import pytest
import torch

from tests.gpu_path.serving import SINKS, WINDOW, serve

# [layers][KV heads]: both layers mixed, in different places.
HEADS = {"retrieval_heads": [[1, 0], [0, 1]]}
WHOLE_LAYERS = {"retrieval_layers": [1]}


@pytest.mark.parametrize("retrieval", [HEADS, WHOLE_LAYERS])
def test_tokens_and_logprobs_of_the_cpu_path(
    model, prompts, calls, monkeypatch, retrieval
):
    from vllm_sink.attention import gpu

    tables, build = [], gpu.HeadTable.build

    def record(*args):
        tables.append(build(*args))
        return tables[-1]

    monkeypatch.setattr(gpu.HeadTable, "build", record)
    kw = {"retrieval": retrieval}
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


def test_a_mistake_in_one_head_shows(model, prompts, monkeypatch):
    """Heads under each other's policies; tests/mutants.txt has other mistakes."""
    from vllm_sink.attention import gpu

    kw = {"retrieval": HEADS | {"retrieval_window_size": 50}}
    want = serve(model, prompts[1:], interpreted=False, **kw)[1]
    build = gpu.HeadTable.build

    def mistaken(k_caches, v_caches, block_tables, slot_mappings, policies):
        return build(k_caches, v_caches, block_tables, slot_mappings, policies[::-1])

    monkeypatch.setattr(gpu.HeadTable, "build", mistaken)
    got = serve(model, prompts[1:], interpreted=True, **kw)[1]
    difference = (got - want).abs()
    assert difference[: SINKS + WINDOW - 1].max() < 1e-3
    assert not (difference[SINKS + WINDOW :].max() < 1e-2)  # NaN is noticed, too
