"""An independent reference for any architecture: Hugging Face's own forward.

The model runs on two copies of a text in lock-step. Both attend alike, so their
hidden states stay the same; only their position ids differ:

    copy 0    p                    its queries meet the window's keys
    copy 1    min(p, S + W - 1)    its queries meet the sinks' keys

which is the policy's turn, whatever the rotation, its pairing or its scaling: no
table, no angle and nothing of the code under test is used. In ``absolute`` both
copies stand at ``p``.
"""

import torch
import transformers
from transformers import AttentionInterface

NAME = "zoo_reference"
_policy: dict = {}


def _attend(module, query, key, value, mask, scaling=None, **kwargs):
    """[2, H, T, D] -> [2, T, H, D], the same for both copies."""
    sinks, window = _policy["sinks"], _policy["window"]
    own = kwargs.get("sliding_window") or None
    if own is None and getattr(module, "is_sliding", False):
        own = module.sliding_window
    group = query.shape[1] // key.shape[1]
    key = key[0].repeat_interleave(group, dim=0)
    value = value[0].repeat_interleave(group, dim=0)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    length = query.shape[2]
    p, k = torch.arange(length)[:, None], torch.arange(length)[None]
    scores = query[0] @ key.transpose(1, 2) * scaling
    if own is not None:
        own += _policy["extra_window"]
    if own is None:
        seen = (k <= p) & ((k < sinks) | (p - k < window))
        turned = query[1] @ key.transpose(1, 2) * scaling
        scores = torch.where(k < sinks, turned, scores)
    else:
        seen = (k <= p) & (p - k < own)
    if cap := kwargs.get("softcap"):
        scores = torch.tanh(scores / cap) * cap
    scores = scores.masked_fill(~seen, float("-inf"))
    if (logits := kwargs.get("s_aux")) is not None:
        extra = logits.reshape(-1, 1, 1).expand(-1, length, 1)
        weights = torch.softmax(torch.cat([scores, extra], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    output = (weights @ value).transpose(0, 1)
    return torch.stack([output, output]), None


AttentionInterface.register(NAME, _attend)


@torch.inference_mode()
def logprobs(model, tokens, sinks, window, positions, extra_window=0) -> torch.Tensor:
    """[T-1]: the log-probability of each token after the first.

    ``extra_window`` tokens are added to windows of the model's own.
    """
    _policy.update(sinks=sinks, window=window, extra_window=extra_window)
    at = torch.arange(len(tokens))
    capped = at.clamp(max=sinks + window - 1) if positions == "cache" else at
    logits = model(
        torch.tensor([tokens, tokens]),
        position_ids=torch.stack([at, capped]),
        use_cache=False,
    ).logits
    # Not in lock-step: the model has attention that did not come through here.
    assert (logits[0] - logits[1]).abs().max() < 1e-3 * logits.abs().max()
    chosen = torch.tensor(tokens[1:])[:, None]
    return torch.log_softmax(logits[0, :-1].float(), -1).gather(1, chosen)[:, 0]


def load(path, dtype=torch.float32, auto="AutoModelForCausalLM"):
    return (
        getattr(transformers, auto)
        .from_pretrained(path, dtype=dtype, attn_implementation=NAME)
        .eval()
    )
