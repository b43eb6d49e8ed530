"""Offline generation under the policy: ``python example.py MODEL``.

MODEL is a folder or a name on the Hub: any decoder that vLLM serves.
"""

import argparse

from vllm import LLM, SamplingParams

# Every head keeps the first 4 and the last 124 tokens of a request: few, to show it.
POLICY = {"num_sink_tokens": 4, "window_size": 124}
PROMPTS = ["The lighthouse keeper wrote every evening:", "A list of prime numbers:"]


def main(model: str) -> None:
    llm = LLM(model, attention_backend="sink", additional_config={"sink": POLICY})
    # Longer than what is kept: memory stops growing, the answer goes on.
    params = SamplingParams(temperature=0.8, max_tokens=160, ignore_eos=True)
    for output in llm.generate(PROMPTS, params):
        (answer,) = output.outputs
        print(f"\n{output.prompt!r}\n{answer.text!r} ({len(answer.token_ids)} tokens)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a model's folder, or its name on the Hub")
    main(parser.parse_args().model)
