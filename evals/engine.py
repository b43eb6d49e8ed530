"""Log-probabilities of a long text from a vLLM engine in this process."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from vllm import LLM

    from evals.policies import Policy


@contextlib.contextmanager
def open_engine(model: str, policy: Policy, max_model_len: int) -> Iterator[LLM]:
    """An fp32 engine under ``policy`` for texts of ``max_model_len`` tokens.

    The rotary table is lengthened where the model's own is shorter.
    """
    # In one process the next engine starts in seconds.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    from vllm_sink.rotation.table_length import overrides_for

    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=max_model_len,
        max_num_batched_tokens=2048,
        disable_log_stats=True,
        hf_overrides=overrides_for(model, max_model_len),
        **policy.engine_args(),
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def logprobs(llm: LLM, tokens: list[int]) -> np.ndarray:
    """[T-1] the log-probability of each token after the first, in nats."""
    import numpy as np
    from vllm import SamplingParams

    output = llm.generate(
        [{"prompt_token_ids": tokens}],
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0),
        use_tqdm=False,
    )[0]
    entries = output.prompt_logprobs[1:]
    return np.array(
        [entry[token].logprob for entry, token in zip(entries, tokens[1:], strict=True)]
    )
