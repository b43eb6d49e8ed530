"""A Gemma-3-like model: full attention under the policy beside sliding windows."""

from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.request import Request

from tests.helpers.block_managers import make_manager
from tests.helpers.engine import managers, prompt_logprobs, sink_engine
from tests.helpers.random_gemma import save_gemma
from tests.helpers.reference import load, logits, logprobs
from vllm_sink.attention import backend
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.start import log_lines

TOLERANCE = 2e-3
SINKS, WINDOW = 4, 60
SLIDING = 40  # Gemma's own window, of every other layer
BLOCK = 32
VOCABULARY = 512
CHUNKED = {
    "block_size": BLOCK,
    "max_model_len": 1024,
    "max_num_batched_tokens": 96,
    "skip_tokenizer_init": True,
}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """(folder, reference model): random weights, saved here."""
    path = tmp_path_factory.mktemp("hybrid")
    save_gemma(path, vocab_size=VOCABULARY, sliding_window=SLIDING)
    return str(path), load(path)


def random_tokens(seed: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()


@pytest.mark.parametrize("retention", [0, 2 * BLOCK])
def test_hybrid_model(hybrid, retention):
    """Exact in every chunk; a hit spans both groups and changes nothing."""
    path, model = hybrid
    tokens = random_tokens(1, 500)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with sink_engine(
        path,
        SINKS,
        WINDOW,
        **CHUNKED,
        prefix_cache_retention_interval=retention,
    ) as llm:
        names = sorted(type(manager).__name__ for manager in managers(llm))
        assert names == ["SinkManager", "SlidingWindowManager"]
        got = prompt_logprobs(llm, [tokens])[0]
        want, dense = (
            logprobs(model, tokens, SINKS, window) for window in (WINDOW, 4096)
        )
        assert (got - want).abs().max() < TOLERANCE
        assert (got - dense).abs().max() > 0.1, "the policy must be visible"
        assert llm.reset_prefix_cache()
        history, hits, last = tokens[:400], [], 0
        for turn in range(3):
            output = llm.generate(
                [{"prompt_token_ids": history}], params, use_tqdm=False
            )[0]
            hits.append(output.num_cached_tokens)
            generated = list(output.outputs[0].token_ids)
            scores = logits(model, history + generated, SINKS, WINDOW)
            choice = scores[len(history) - 1 : -1].argmax(-1).tolist()
            assert generated == choice
            if turn:
                # The last prompt's end is kept; the intervals past it, too.
                end = (last - 1) // BLOCK * BLOCK
                assert hits[turn] >= end
                if retention == 0:
                    assert hits[turn] == end
            last = len(history)
            history = history + generated + random_tokens(10 + turn, 21)
        print(hits)


def test_a_window_that_equals_the_models_own(hybrid, monkeypatch):
    """W = 40, sliding layer first; long enough for freed blocks to be used again."""
    path, model = hybrid
    tokens = random_tokens(2, 500)
    said = []
    say = SimpleNamespace(info=lambda text, *args: said.append(text % args))
    monkeypatch.setattr(log_lines, "logger", say)
    with sink_engine(path, SINKS, SLIDING, **CHUNKED) as llm:
        kinds = sorted(type(manager).__name__ for manager in managers(llm))
        (got,) = prompt_logprobs(llm, [tokens])
    assert kinds == ["SinkManager", "SlidingWindowManager"]
    (line,) = said  # no start line, no policy
    assert line.startswith("Sink policy: each token sees the first 4 and the last 40")
    want = logprobs(model, tokens, SINKS, SLIDING)
    assert (got - want).abs().max() < TOLERANCE


def test_groups_that_swallow_our_layers_end_the_start(hybrid, monkeypatch):
    """Whatever the cause: here the window's spec is vLLM's own again."""
    monkeypatch.setattr(backend.OwnWindowSpec, "from_window", lambda spec: spec)
    message = (
        r"model\.layers\.1\.self_attn\.attn must be managed by SinkManager of 4 \+ 40 "
        r"tokens with --attention-backend sink, got SlidingWindowManager; choose a sink"
    )
    with (
        pytest.raises(ValueError, match=message),
        sink_engine(hybrid[0], SINKS, SLIDING, **CHUNKED),
    ):
        pass


@pytest.mark.parametrize("retention", [None, 0, 64, 128])
def test_retention_interval_is_the_sliding_windows_plus_sinks(retention):
    """Cached blocks of both groups of one request: the same tails, and the sinks.

    vLLM's default, 0, is for the sliding layers alone.
    """
    policy, size, length = RetentionPolicy(20, 40), 16, 330
    shape = dict(block_size=size, num_kv_heads=1, head_size=16, dtype=torch.float32)
    sliding = SlidingWindowSpec(**shape, sliding_window=40)
    manager = make_manager(
        policy,
        size,
        100,
        max_model_len=400,
        max_in_flight_tokens=400,
        other_specs=[sliding],
        prefix_cache_retention_interval=retention,
    )
    init_none_hash(sha256)
    request = Request(
        "a",
        list(range(length)),
        SamplingParams(max_tokens=9),
        None,
        block_hasher=get_request_block_hasher(size, sha256),
    )
    assert manager.allocate_slots(request, length)
    request.num_computed_tokens = length
    cached = [
        {i for i, block in enumerate(row) if block.block_hash is not None}
        for row in manager.coordinator.get_blocks("a")
    ]
    sinks = {0, 1}  # ceil(20 / 16)
    full = set(range(length // size))
    assert cached[0] == (cached[1] | sinks if retention else full)
    boundary = (length - 1) // size
    assert cached[1] >= {boundary - 3, boundary - 2, boundary - 1}  # ceil(39 / 16)
    assert (cached[1] == full) == (retention is None)
    assert (cached[1] >= sinks) == (retention is None), "the sinks must be our doing"
