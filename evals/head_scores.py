"""A score of heads that was tried beside the ones of ``vllm-sink heads``."""

from __future__ import annotations

import torch

from vllm_sink.tools.heads import scores, texts
from vllm_sink.tools.heads.attention import Headwise, Layers

FIRST_KEYS = 4  # of a passage: sinks, which every head keeps


@torch.inference_mode()
def repeat(model, tokenizer, text: str, layers: Layers) -> scores.Scores:
    """KVzip's (arXiv 2505.23416), a head's: what its keys are worth to a repetition.

    A passage is read twice over, as the recipe's. A key is worth the largest attention
    that the second copy pays it; a head the mean of its keys of the first copy.
    """
    size, opening = scores.PASSAGE_LENGTH, texts.opening(tokenizer)
    start = len(opening) + FIRST_KEYS
    stop = len(opening) + size
    total = torch.zeros(layers.num_layers, layers.num_kv_heads)
    for passage in texts.passages(tokenizer, text, scores.NUM_PASSAGES, size):
        worth: dict[int, torch.Tensor] = {}

        def watch(layer: int, weights: torch.Tensor, _first: int, worth=worth) -> None:
            most = weights[0, :, :, :, start:stop].amax(dim=(1, 2)).cpu()
            worth[layer] = torch.maximum(worth.get(layer, most), most)

        tokens = torch.tensor([opening + passage + passage], device=model.device)
        with Headwise(watch=watch, watch_from=stop):
            model.base_model(tokens, use_cache=False)
        for reader, owner in layers.readers:
            worth[owner] = torch.maximum(worth[owner], worth.pop(reader))
        for layer, keys in worth.items():
            total[layer] += keys.mean(1) / scores.NUM_PASSAGES
    return scores.Scores(torch.where(layers.free, total, torch.zeros(())), {}, layers)
