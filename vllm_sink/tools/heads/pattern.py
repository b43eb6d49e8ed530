"""Pattern files: a score per KV head, as DuoAttention's are written.

``heads.tsv`` is a row a layer and a column a KV head (``numpy.savetxt``'s format, no
header); ``heads.tsv.meta.json`` beside it says what the scores are of and what was
found. ``sink.retrieval_heads`` reads them back
(:mod:`vllm_sink.settings.pattern_files`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vllm_sink.settings.pattern_files import DIGEST, META_SUFFIX, digest
from vllm_sink.tools import written

TOOL = "vllm-sink heads"
ENDINGS = (".tsv", ".txt")


def meta_path(path: Path) -> Path:
    """The JSON that belongs to the pattern."""
    return path.with_name(path.name + META_SUFFIX)


def refuse_unwritable(path: Path, pictures: list[Path]) -> None:
    """Refuse a pattern that could not be read back, or that would overwrite others'.

    Raises:
        ValueError: Names the path and the remedy.
    """
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(
            f"--out must end in {' or '.join(ENDINGS)}, got {str(path)!r}; write for "
            "example heads.tsv"
        )
    written.refuse_foreign(meta_path(path), [path, *pictures], TOOL)
    record = written.record_of(meta_path(path), TOOL)
    if record is None or not path.is_file():
        return
    if record.get(DIGEST) != digest(path.read_text(encoding="utf-8", errors="replace")):
        raise ValueError(
            f"--out must not overwrite a pattern that was changed since {TOOL} wrote "
            f"it, got {str(path)!r}; give another --out, or move it away"
        )


def write(
    path: Path,
    scores: torch.Tensor,
    config: dict[str, Any],
    pictures: list[Path] | None = None,
) -> Path:
    """Write the scores [L, HKV] to ``path``; returns the path of the JSON beside it.

    Args:
        config: What goes into it; ``retrieval_fraction`` is what the plugin takes
            where the user gives none.
        pictures: Files that are drawn later and belong to the pattern, too.

    Raises:
        ValueError: Something else is there: :func:`refuse_unwritable`.
    """
    pictures = pictures or []
    refuse_unwritable(path, pictures)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ("\t".join(f"{value:.18e}" for value in row) for row in scores.tolist())
    content = "".join(f"{row}\n" for row in rows)
    beside = meta_path(path)
    values = {**config, DIGEST: digest(content)}
    # First: a pattern without it would be taken for somebody else's.
    written.write_record(beside, TOOL, [path, *pictures], values)
    written.replace(path, content)
    return beside
