"""A LoRA adapter under the policy answers as its merged weights do."""

import json

import pytest
import torch
from safetensors.torch import save_file
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from tests.helpers.engine import sink_engine
from tests.helpers.random_llama import save_llama
from tests.helpers.reference import DenseReference

SINKS, WINDOW = 4, 60
RANK, ALPHA = 4, 8
TOLERANCE = 2e-3  # of a log-probability, float32
VISIBLE = 0.1


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(model, adapter, the model with the adapter's weights merged into its own)"""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("lora")
    base = save_llama(root / "base", num_hidden_layers=2, vocab_size=256)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weights = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(("q_proj", "k_proj", "v_proj", "down_proj")):
                a = 0.3 * torch.randn(RANK, module.in_features)
                b = 0.03 * torch.randn(module.out_features, RANK)
                weights[f"base_model.model.{name}.lora_A.weight"] = a
                weights[f"base_model.model.{name}.lora_B.weight"] = b
                module.weight += ALPHA / RANK * b @ a
    model.save_pretrained(root / "merged")
    adapter = root / "adapter"
    adapter.mkdir()
    save_file(weights, adapter / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
        "bias": "none",
        "base_model_name_or_path": base,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return base, str(adapter), str(root / "merged")


def test_an_adapter_is_exact_past_the_window(folders):
    base, adapter, merged = folders
    prompt = torch.randint(
        3, 256, (150,), generator=torch.Generator().manual_seed(5)
    ).tolist()
    params = SamplingParams(
        temperature=0, max_tokens=80, ignore_eos=True, logprobs=0, detokenize=False
    )
    with sink_engine(
        base,
        SINKS,
        WINDOW,
        max_model_len=512,
        max_num_batched_tokens=64,
        max_num_seqs=2,
        block_size=32,
        enable_lora=True,
        max_lora_rank=8,
        max_loras=1,
        skip_tokenizer_init=True,
    ) as llm:
        (output,) = llm.generate(
            [{"prompt_token_ids": prompt}],
            params,
            use_tqdm=False,
            lora_request=LoRARequest("adapter", 1, adapter),
        )
    reply = output.outputs[0]
    answer = list(reply.token_ids)
    got = torch.tensor(
        [
            entry[token].logprob
            for entry, token in zip(reply.logprobs, answer, strict=True)
        ]
    )

    def want(path: str, window: int) -> torch.Tensor:
        scores = DenseReference(path).logprobs(prompt + answer, SINKS, window)
        return scores[len(prompt) - 1 :]

    exact = want(merged, WINDOW)
    assert (got - exact).abs().max() < TOLERANCE
    # Neither the adapter nor the policy is without effect.
    assert (want(base, WINDOW) - exact).abs().max() > VISIBLE
    assert (want(merged, 512) - exact).abs().max() > VISIBLE
