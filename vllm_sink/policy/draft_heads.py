"""The KV heads of a drafter beside retrieval heads: their kind and their number.

A head map has a row for each layer of the served model, none for a drafter's. Its
layers' KV heads are all of one kind, by what they were trained for:

* EAGLE and EAGLE3 *stream*. Their layer is trained on dialogues of some 2,048 tokens
  (arXiv 2401.15077, 2503.01840) and loses its acceptance on longer ones; what lies
  far back reaches it in the model's hidden states, which the retrieval heads made.
  Sinks and a window keep its distances within what it has seen.
* MTP layers *keep everything*, as retrieval heads do. They are trained with the
  model, on its lengths (DeepSeek-V3, arXiv 2412.19437), and look everywhere.

Where all of the model's heads are of one kind, a drafter's are of that kind, too. No
token depends on it: what is drafted is checked by the model.
"""

from __future__ import annotations

from dataclasses import dataclass

# Method of vLLM's speculative_config -> whether its layers keep everything.
KEEPS_EVERYTHING = {"eagle": False, "eagle3": False, "mtp": True}


@dataclass(frozen=True)
class DraftHeads:
    """The KV heads of a drafter, which a pipeline's last stage holds.

    Args:
        num_layers: Layers. num_kv_heads: KV heads of a layer, of the whole drafter.
        is_retrieval: The kind of all of them.
    """

    num_layers: int
    num_kv_heads: int
    is_retrieval: bool
