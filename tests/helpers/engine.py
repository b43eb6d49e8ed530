"""Engines in this process, log-probabilities from them, and a look inside.

Tests, evals, scripts and benchmarks start theirs here.
"""

import contextlib
import gc
import os
from pathlib import Path

# Before vLLM reads it: no second process, so that the next engine starts in seconds.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


@contextlib.contextmanager
def uncollected():
    """vLLM collects garbage eight times an engine, each time all that is imported."""
    collect, gc.collect = gc.collect, lambda *generation: 0
    try:
        yield
    finally:
        gc.collect = collect


def start_engine(
    model, sinks=None, window=None, *, positions="cache", retrieval=None, **kwargs
) -> LLM:
    """An engine under (S, W); stock attention when ``sinks`` is None.

    Args:
        retrieval: Settings of retrieval heads, without their ``retrieval_``.
        kwargs: More of ``vllm.LLM``'s; float32 without graphs if they don't say.
    """
    if sinks is not None:
        kwargs["attention_backend"] = "sink"
        kwargs["additional_config"] = {
            "sink": {
                "num_sink_tokens": sinks,
                "window_size": window,
                "sink_positions": positions,
                **{f"retrieval_{name}": x for name, x in (retrieval or {}).items()},
            }
        }
    kwargs.setdefault("max_model_len", 4096)
    kwargs.setdefault("dtype", "float32")
    kwargs.setdefault("enforce_eager", True)
    # Random models have no tokenizer.
    kwargs.setdefault("skip_tokenizer_init", not any(Path(model).glob("tokenizer*")))
    with uncollected():
        return LLM(model, disable_log_stats=True, **kwargs)


@contextlib.contextmanager
def sink_engine(model, *policy, **kwargs):
    """:func:`start_engine`'s for a block, its memory given back afterwards."""
    try:
        llm = start_engine(model, *policy, **kwargs)
    except BaseException:
        # Else the next engine gets this one's process groups: none of experts, say.
        cleanup_dist_env_and_memory()
        raise
    try:
        yield llm
    finally:
        with uncollected():
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()
        gc.collect()


# What scores a prompt and generates nothing that anyone reads.
SCORING = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)


def prompt_logprobs(llm, prompts) -> list[torch.Tensor]:
    """For each token list, [T-1] log-probabilities of its tokens."""
    outputs = llm.generate(
        [{"prompt_token_ids": tokens} for tokens in prompts], SCORING, use_tqdm=False
    )
    return [output_logprobs(output) for output in outputs]


def output_logprobs(output) -> torch.Tensor:
    """[T-1] log-probabilities of each token after the first, as far as asked for.

    The prompt's if ``prompt_logprobs`` were, then the reply's if ``logprobs`` were.
    """
    reply = output.outputs[0]
    entries, tokens = [], []
    if output.prompt_logprobs is not None:
        entries += output.prompt_logprobs[1:]
        tokens += output.prompt_token_ids[1:]
    if reply.logprobs is not None:
        entries += reply.logprobs
        tokens += reply.token_ids
    pairs = zip(entries, tokens, strict=True)
    return torch.tensor([entry[token].logprob for entry, token in pairs])


def run_steps(llm, prompts, params, on_step) -> dict[str, list[int]]:
    """Generate step by step; ``on_step()`` runs after each step."""
    engine = llm.llm_engine
    for index, tokens in enumerate(prompts):
        engine.add_request(str(index), {"prompt_token_ids": tokens}, params)
    finished = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
        on_step()
    return finished


def core(llm):
    return llm.llm_engine.engine_core.engine_core


def manager(llm):
    """The block manager of the first KV cache group."""
    return managers(llm)[0]


def managers(llm):
    """The block managers of all KV cache groups."""
    return core(llm).scheduler.kv_cache_manager.coordinator.single_type_managers


def model_runner(llm):
    return core(llm).model_executor.driver_worker.worker.model_runner
