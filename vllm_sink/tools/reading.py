"""Readers of a model by its name, which refuse it in one line that has the name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from vllm_sink.tools.cli import one_line


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """A context in which every error names the model ``name``.

    Raises:
        ValueError: The folder does not exist, or what there is can't be read.
    """
    refuse_missing_folder(name)
    try:
        yield
    except Exception as error:  # transformers, the Hub, torch: many kinds
        told = one_line(error)
        if isinstance(error, ValueError) and name in told and " must " in told:
            raise
        raise ValueError(
            "--model must be a folder or a Hub name of a model that transformers "
            f"reads, got {name!r} ({type(error).__name__}: {told}); mend the model's "
            "files, or name another"
        ) from error


def refuse_missing_folder(name: str) -> None:
    """Refuse a missing folder; ``owner/name`` may be on the Hub."""
    is_path = (
        os.path.isabs(name)
        or name.startswith((".", "~"))
        or name.endswith((os.sep, ".json"))
        or name.count("/") > 1
    )
    if is_path and not os.path.exists(name):
        raise ValueError(
            "--model must be a folder that exists, or a name on the Hub, got "
            f"{name!r}, which does not exist; check the path"
        )


def load_whole(name: str, **settings: Any) -> Any:
    """Transformers' model with every weight from the checkpoint.

    Args:
        settings: Of ``from_pretrained``.

    Raises:
        ValueError: Weights are missing or of another shape: transformers would make
            new ones.
    """
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(
        name, output_loading_info=True, **settings
    )
    missing = sorted(found["missing_keys"])
    mismatched = sorted(str(entry[0]) for entry in found["mismatched_keys"])
    for what, keys in (("no", missing), ("another shape of", mismatched)):
        if keys:
            raise ValueError(
                f"--model must have all weights of {type(model).__name__}, got "
                f"{name!r} with {what} {keys[0]} (and {len(keys) - 1} more); complete "
                "the checkpoint: newly made weights measure nothing"
            )
    return model.eval()
