"""Checkpoints whose weights are rounded to 4 or 8 bits, for ``benchmarks.peers``.

Rounded to nearest by llm-compressor (``pip install llmcompressor``), without data; the
formats are those of vLLM's compressed-tensors checkpoints that a CPU runs, too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

# 64 divides the rows of a small model's matrices, too.
SCHEMES = {
    "W4A16": {
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": 64,
        }
    },
    "W8A8": {
        "weights": {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "channel",
        },
        "input_activations": {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        },
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--scheme", choices=SCHEMES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    group = {"targets": ["Linear"], **SCHEMES[args.scheme]}
    recipe = QuantizationModifier(config_groups={"all": group}, ignore=["lm_head"])
    oneshot(model=model, tokenizer=tokenizer, recipe=recipe)
    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
