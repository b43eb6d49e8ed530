"""A check of the whole engine: a small random model past its window and a reference.

    python -m scripts.engine_check               # a GPU: default runner, graphs on
    python -m scripts.engine_check --interpret   # no GPU: Triton's interpreter

``scripts/gpu_check.py`` runs it where vLLM can be imported. Prompts in chunks and
generated tokens, both past the window, must have the log-probabilities that Hugging
Face's model has under a dense mask of the policy (tests/helpers/reference.py),
in float32; the same model without the policy must be told apart from it. On a GPU that
is done twice: with the policy in every head, and with retrieval heads among them.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # to look inside
if "--interpret" in sys.argv:  # before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch

TOLERANCE = 2e-3  # float32 through two implementations, of log-probabilities
VISIBLE = 0.1  # how far the model without the policy must be at least
VOCABULARY = 512


@dataclass
class Outcome:
    """Measurements of an engine.

    Args:
        runner: The model runner's class, with its module.
        graphs: vLLM's CUDA graph mode.
        prompt_error, reply_error: Largest differences of log-probabilities from
            the reference's; infinite for NaN.
        without_policy: Largest difference of the reference without a window (or, if
            that is less, without retrieval heads) from the one with the policy: what
            an ignored setting would have shown.
        num_tokens: Of the longest request.
    """

    runner: str
    graphs: str
    prompt_error: float
    reply_error: float
    without_policy: float
    num_tokens: int

    @property
    def problems(self) -> list[str]:
        found = []
        for what in ("prompt", "reply"):
            error = getattr(self, f"{what}_error")
            if not error <= TOLERANCE:
                found.append(
                    f"log-probabilities of the {what} must be the reference's within "
                    f"{TOLERANCE}, got a difference of {error:.2g}"
                )
        if self.without_policy < VISIBLE:
            found.append(
                f"the policy must be visible by {VISIBLE}, got {self.without_policy}"
            )
        return found


def random_prompts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randint(1, VOCABULARY, (n,), generator=generator).tolist()
        for n in lengths
    ]


def check_engine(
    model: str,
    sinks: int,
    window: int,
    lengths: list[int],
    max_tokens: int,
    heads: list[list[int]] | None = None,
    **settings,
) -> Outcome:
    """Serve ``model`` under (sinks, window) and compare.

    Args:
        lengths: Of the prompts, tokens.
        heads: [layers][KV heads], 1 for a retrieval head.
        settings: More of ``vllm.LLM``'s; ``triton_interpreter`` belongs to the policy.
    """
    from vllm import SamplingParams

    from tests.helpers.engine import model_runner, output_logprobs, sink_engine
    from tests.helpers.reference import DenseReference, HeadsReference

    section = {
        "num_sink_tokens": sinks,
        "window_size": window,
        "triton_interpreter": settings.pop("triton_interpreter", False),
    }
    if heads is not None:
        section["retrieval_heads"] = heads
    prompts = random_prompts(lengths)
    params = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        prompt_logprobs=0,
    )
    settings = {
        "enforce_eager": False,
        "attention_backend": "sink",
        "additional_config": {"sink": section},
        "max_model_len": max(lengths) + max_tokens,
        "max_num_seqs": 8,
        "max_num_batched_tokens": max(lengths) // 3,
        **settings,
    }
    with sink_engine(model, **settings) as llm:
        kind = type(model_runner(llm))
        mode = llm.llm_engine.vllm_config.compilation_config.cudagraph_mode
        outputs = llm.generate(
            [{"prompt_token_ids": tokens} for tokens in prompts], params, use_tqdm=False
        )
    dense = DenseReference(model)
    policies = [lambda tokens: dense.logprobs(tokens, sinks, len(tokens))]
    if heads is None:
        reference = lambda tokens: dense.logprobs(tokens, sinks, window)  # noqa: E731
    else:
        reference = HeadsReference(dense, heads, sinks, window).logprobs
        policies.append(lambda tokens: dense.logprobs(tokens, sinks, window))
    outcome = Outcome(f"{kind.__module__}.{kind.__name__}", str(mode), 0, 0, 0, 0)
    for prompt, output in zip(prompts, outputs, strict=True):
        reply = output.outputs[0]
        tokens = prompt + list(reply.token_ids)
        got = output_logprobs(output)
        want = reference(tokens)
        error = (got - want).abs().nan_to_num(torch.inf)
        split = len(prompt) - 1
        shown = min((other(tokens) - want).abs().max().item() for other in policies)
        outcome.prompt_error = max(outcome.prompt_error, error[:split].max().item())
        outcome.reply_error = max(outcome.reply_error, error[split:].max().item())
        outcome.without_policy = max(outcome.without_policy, shown)
        outcome.num_tokens = max(outcome.num_tokens, len(tokens))
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interpret", action="store_true", help="run without a GPU")
    args = parser.parse_args()
    from tests.helpers.random_llama import save_llama

    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        save_llama(folder, vocab_size=VOCABULARY)
        if args.interpret:
            policy = {"sinks": 4, "window": 20, "lengths": [61, 22], "max_tokens": 5}
            settings = {"enforce_eager": True, "triton_interpreter": True}
            head_maps = [None]
        else:
            # Replies longer than the window: graphs replay across its edge.
            policy = {"sinks": 4, "window": 60, "lengths": [300, 33], "max_tokens": 150}
            settings = {"gpu_memory_utilization": 0.3}
            head_maps = [None, [[1, 0], [0, 1], [0, 0]]]
        for heads in head_maps:
            outcome = check_engine(
                folder, **policy, heads=heads, block_size=16, **settings
            )
            print(outcome)
            for problem in outcome.problems:
                print(f"FAILED, {problem}")
            failed += len(outcome.problems)
    print(f"engine: {outcome.num_tokens} tokens, {failed} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
