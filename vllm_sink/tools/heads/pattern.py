"""Pattern files: a score per KV head, as DuoAttention's are written.

``heads.tsv`` is a row a layer and a column a KV head (``numpy.savetxt``'s format, no
header); ``config.json`` beside it says what the scores are of and what was found.
``sink.retrieval_heads`` reads them back (``vllm_sink.policy.head_map``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def write(path: Path, scores: torch.Tensor, config: dict[str, Any]) -> Path:
    """Write the scores [L, HKV] to ``path``; returns the path of the ``config.json``.

    Args:
        config: What goes into it; ``retrieval_fraction`` is what the plugin takes
            where the user gives none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ("\t".join(f"{value:.18e}" for value in row) for row in scores.tolist())
    _replace(path, "".join(f"{row}\n" for row in rows))
    beside = path.with_name("config.json")
    _replace(beside, json.dumps(config, indent=1) + "\n")
    return beside


def _replace(path: Path, content: str) -> None:
    """A file that exists is whole."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(content, encoding="utf-8")
    draft.replace(path)
