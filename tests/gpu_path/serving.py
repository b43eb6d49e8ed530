"""Engines on the GPU path and on the CPU path, and their answers."""

import torch

SINKS, WINDOW = 4, 20
MAX_TOKENS = 8


def serve(model, prompts, *, interpreted, positions="cache", retrieval=None, **kwargs):
    """Generated tokens, and log-probabilities of prompt and generated tokens."""
    from vllm import SamplingParams

    from tests.helpers.engine import sink_engine

    section = {
        "num_sink_tokens": SINKS,
        "window_size": WINDOW,
        "sink_positions": positions,
        "triton_interpreter": interpreted,
        **(retrieval or {}),
    }
    settings = {
        "attention_backend": "sink",
        "additional_config": {"sink": section},
        "max_model_len": 128,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 40,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "block_size": 16,
        "num_gpu_blocks_override": 100,
    }
    with sink_engine(model, **(settings | kwargs)) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": tokens} for tokens in prompts],
            SamplingParams(
                temperature=0,
                max_tokens=MAX_TOKENS,
                ignore_eos=True,
                detokenize=False,
                logprobs=0,
                prompt_logprobs=0,
            ),
            use_tqdm=False,
        )
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    logprobs = [
        entry[token].logprob
        for output, prompt in zip(outputs, prompts, strict=True)
        for entry, token in zip(
            [*output.prompt_logprobs[1:], *output.outputs[0].logprobs],
            [*prompt[1:], *output.outputs[0].token_ids],
            strict=True,
        )
    ]
    return tokens, torch.tensor(logprobs)
