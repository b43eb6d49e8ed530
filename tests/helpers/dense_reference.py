"""An independent reference: Hugging Face's model under a dense S+W mask.

Nothing of the code under test is used: no paging, no table rows. The sinks'
distance is capped by turning the query with angles computed in float64 from
the model's rotary base.
"""

from functools import cached_property

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

_policy: dict = {}
QUERY_CHUNK = 256


def _turn(q: torch.Tensor, distance: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotate [1, H, T, D] by ``distance`` [T] positions (neox pairs)."""
    dim = q.shape[-1]
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = distance.double()[:, None] * frequency
    cos, sin = angle.cos().float(), angle.sin().float()
    x, y = q[..., : dim // 2], q[..., dim // 2 :]
    return torch.cat([x * cos - y * sin, y * cos + x * sin], dim=-1)


def _dense_sink_attention(module, query, key, value, mask, scaling, **kwargs):
    sinks, window = _policy["sinks"], _policy["window"]
    group = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group, dim=1)
    value = value.repeat_interleave(group, dim=1)
    length = query.shape[2]
    k = torch.arange(length)
    outputs = []
    for start in range(0, length, QUERY_CHUNK):
        p = torch.arange(start, min(start + QUERY_CHUNK, length))
        q = query[:, :, p]
        scores = q @ key.transpose(2, 3) * scaling
        if _policy["positions"] == "cache" and sinks:
            distance = p.clamp(max=sinks + window - 1) - p
            turned = _turn(q, distance, _policy["theta"])
            scores[..., :sinks] = turned @ key[:, :, :sinks].transpose(2, 3) * scaling
        causal = k[None] <= p[:, None]
        kept = (k[None] < sinks) | (p[:, None] - k[None] < window)
        scores = scores.masked_fill(~(causal & kept), float("-inf"))
        outputs.append(torch.softmax(scores, dim=-1) @ value)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register("dense_sink_reference", _dense_sink_attention)


class DenseReference:
    """Log-probabilities of a Llama-like model under (S, W)."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="dense_sink_reference"
        ).eval()
        self.theta = self.model.config.rope_parameters["rope_theta"]
        self._known: dict[tuple, torch.Tensor] = {}

    @cached_property
    def tokenizer(self):
        """The model's; a random model has none."""
        return AutoTokenizer.from_pretrained(self.path)

    @torch.inference_mode()
    def logits(self, tokens, sinks, window, positions="cache") -> torch.Tensor:
        """[T, V] float32."""
        _policy.update(
            sinks=sinks, window=window, positions=positions, theta=self.theta
        )
        return self.model(torch.tensor([list(tokens)]), use_cache=False).logits[0]

    def logprobs(self, tokens, sinks, window, positions="cache") -> torch.Tensor:
        """[T-1]: the log-probability of each token after the first."""
        key = (tuple(tokens), sinks, window, positions)
        if key not in self._known:  # tests ask for the same texts again
            logits = self.logits(*key)[:-1]
            chosen = torch.tensor(tokens[1:])[:, None]
            scores = torch.log_softmax(logits, -1).gather(1, chosen)[:, 0]
            self._known[key] = scores
        return self._known[key]
