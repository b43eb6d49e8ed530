"""The finder's words: its figures are those of a server with the default policy."""

from types import SimpleNamespace

import torch

from vllm_sink.policy.config import SinkConfig
from vllm_sink.tools import find_heads


def test_memory_is_the_default_policys():
    layers = SimpleNamespace(full=[0, 1], num_kv_heads=2, num_heads=4)
    scores = SimpleNamespace(layers=layers, order=lambda: [(1, 0)])
    kept = torch.tensor([[0, 0], [1, 0]])
    args = SimpleNamespace(model="m")
    text = find_heads.summary(args, scores, kept, None, ["heads.tsv"])
    assert SinkConfig().policy.budget == 4096
    # A quarter keeps everything, the others 4,096 tokens: 1/4 + 3/4 x 4096/length.
    assert "with the default S + W = 4,096: 62% at 8,192 tokens, 34% at" in text
    assert "34% at 32,768 tokens, 27% at 131,072 tokens." in text
