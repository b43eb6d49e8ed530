"""A bare ``--attention-backend sink``: 4 + 4,092, and full attention below that."""

import pytest
from vllm import SamplingParams

from tests.helpers.engine import core, manager, sink_engine
from tests.helpers.random_llama import save_llama
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.start import log_lines
from vllm_sink.start.log_lines import format_bytes


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"), max_position_embeddings=8192)


@pytest.fixture
def lines(monkeypatch):
    """The block manager's log; a handler would be dropped as vLLM sets up its own."""
    found = []
    monkeypatch.setattr(
        log_lines.logger, "info", lambda text, *values: found.append(text % values)
    )
    return found


OPTIONS = {"skip_tokenizer_init": True, "max_num_batched_tokens": 256}


def test_bare_flag(llama, lines):
    """The line's memory is that of the pool's own tensors."""
    with sink_engine(
        llama, attention_backend="sink", max_model_len=8192, **OPTIONS
    ) as llm:
        assert manager(llm).policy == RetentionPolicy(4, 4092)
        cap = manager(llm).max_admission_blocks_per_request
        cache = core(llm).scheduler.kv_cache_config
        pool = sum(tensor.size for tensor in cache.kv_cache_tensors)
        block = pool // cache.num_blocks
    (line,) = (line for line in lines if line.startswith("Sink policy"))
    assert "each token sees the first 4 and the last 4,092 tokens" in line
    assert f"at most {format_bytes(cap * block)} of" in line
    assert f"instead of {format_bytes(64 * block)}, so" in line


def test_short_model_is_stock_attention(llama, lines):
    prompt = {"prompt_token_ids": list(range(1, 300))}
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    answers = []
    for flag in ({"attention_backend": "sink"}, {}):
        with sink_engine(llama, max_model_len=1024, **OPTIONS, **flag) as llm:
            answers.append(llm.generate(prompt, params, use_tqdm=False)[0].outputs[0])
    assert answers[0].token_ids == answers[1].token_ids
    assert any("full attention, because max_model_len 1,024" in line for line in lines)
