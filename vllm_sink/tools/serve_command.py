"""A tool's advice as a command to type, or the reason why it would not start."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import shlex
import sys
from typing import Any

# What the start tells to pass where it refuses images and serves the text.
TEXT_ALONE = "--language-model-only"


def serve_command(
    model: str, section: dict[str, Any], revision: str | None = None
) -> list[str]:
    """The words of ``vllm serve``.

    Args:
        section: The ``sink`` section.
        revision: Of the model on the Hub.
    """
    words = ["vllm", "serve", model]
    if revision is not None:
        words += ["--revision", revision]
    words += ["--attention-backend", "sink"]
    return [*words, "--additional-config", json.dumps({"sink": section})]


def refusal(command: list[str]) -> str | None:
    """The reason why the command would not start on this machine, or None.

    Asks ``vllm-sink check``, which starts it with random weights.
    """
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed here, which tells whether it starts"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_sink.tools import check

    # vLLM logs to standard output, which is the tool's.
    with contextlib.redirect_stdout(sys.stderr):
        return check.check(command[2], command[3:])["refusal"]


def advice(introduction: str, command: list[str]) -> list[str]:
    """Lines: the introduction and the command to type, or why there is none.

    A model that is refused for the images that it reads is served without them: text is
    all that the tools have read. Takes an engine's start, or two: let go of models that
    are loaded before.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    told = refusal(command)
    if told is not None and TEXT_ALONE in told and TEXT_ALONE not in command:
        cut = command.index("--additional-config")
        command = [*command[:cut], TEXT_ALONE, *command[cut:]]
        told = refusal(command)
    if told is not None:
        return [f"No command is printed to serve it so, as it would not start: {told}"]
    return [introduction, *printed(command)]


def printed(command: list[str]) -> list[str]:
    """The command on two lines, quoted for a shell."""
    cut = command.index("--additional-config")
    return [
        f"  {shlex.join(command[:cut])} \\",
        f"      {shlex.join(command[cut:])}",
    ]
