"""A chat that comes back from host memory, on runner V2."""

from tests.helpers.engine import core, model_runner
from tests.helpers.random_llama import save_llama
from tests.helpers.reference import DenseReference
from tests.runner_v2.serving import (
    BLOCK,
    SINKS,
    SMALL,
    TOLERANCE,
    WINDOW,
    ask,
    random_tokens,
    serving,
)

BLOCK_BYTES = 2 * 2 * 32 * 4 * BLOCK  # two layers of one head


def test_a_chat_comes_back(tmp_path):
    model = save_llama(tmp_path, **SMALL)
    prompt = random_tokens(1, 93)
    transfer = dict(
        kv_connector="SinkHostCache",
        kv_role="kv_both",
        kv_connector_extra_config=dict(host_cache_gib=100 * BLOCK_BYTES / 2**30),
    )
    with serving(
        model, "v2", num_gpu_blocks_override=9, kv_transfer_config=transfer
    ) as llm:
        again = prompt + ask(llm, [prompt])[0].tokens + random_tokens(2, 9)
        for seed in range(3, 6):
            ask(llm, [random_tokens(seed, 150)], 1)
        for cache in model_runner(llm).kv_caches:
            cache.fill_(float("nan"))
        (got,) = ask(llm, [again])
        assert got.cached == 96
        assert not core(llm).scheduler.connector.scheduler._loading
    want = DenseReference(model).logprobs(again + got.tokens, SINKS, WINDOW)
    assert (got.logprobs - want[len(again) - 1 :]).abs().max() < TOLERANCE
