"""Records of files that a tool wrote: it overwrites those and no others.

One of them is the *record*, JSON that names the tool and the files beside it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

MARK = "written_by"
FILES = "files"


def record_of(path: Path, tool: str) -> dict[str, Any] | None:
    """The record at ``path``; None where there is none of this tool."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get(MARK) != tool:
        return None
    return record


def refuse_foreign(record_path: Path, paths: list[Path], tool: str) -> None:
    """Refuse to write over files that the tool did not write.

    Args:
        paths: To be written besides the record.

    Raises:
        ValueError: Names the first file that this tool did not write.
    """
    record = record_of(record_path, tool)
    own = {record_path.name, *record.get(FILES, ())} if record else set()
    for path in (record_path, *paths):
        if path.name not in own and (path.exists() or path.is_symlink()):
            raise ValueError(
                f"--out must not overwrite what {tool} did not write, got "
                f"{str(path)!r}, which exists; give another --out, or move it away"
            )
    folder = record_path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(
            f"--out must be in a folder, got {str(record_path.parent)!r}, of which "
            f"{str(folder)!r} is a file; give another --out"
        )


def write_record(path: Path, tool: str, files: list[Path], values: dict) -> None:
    """Write the record of ``files``."""
    record = {MARK: tool, FILES: [file.name for file in files], **values}
    replace(path, json.dumps(record, indent=1) + "\n")


def replace(path: Path, content: str) -> None:
    """Write a file that is whole once it exists."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    draft.write_text(content, encoding="utf-8")
    draft.replace(path)
