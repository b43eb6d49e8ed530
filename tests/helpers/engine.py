"""In-process engines for the tests, and a look inside them."""

import contextlib
import gc
from pathlib import Path

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


@contextlib.contextmanager
def sink_engine(
    model, sinks=None, window=None, *, positions="cache", retrieval=None, **kwargs
):
    """An engine under (S, W); stock attention when ``sinks`` is None.

    ``retrieval``: settings of retrieval heads, without their ``retrieval_``.
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
    # Random models have no tokenizer.
    kwargs.setdefault("skip_tokenizer_init", not any(Path(model).glob("tokenizer*")))
    with uncollected():
        llm = LLM(model, enforce_eager=True, disable_log_stats=True, **kwargs)
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
    """[T-1] log-probabilities of the prompt's tokens in a reply to SCORING."""
    pairs = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
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
