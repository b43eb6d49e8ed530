"""A check for keys of ``additional_config`` that look like the ``sink`` section.

vLLM hands ``additional_config`` to every plugin and refuses no key, so a misspelt
section would leave the defaults in force. Other plugins' keys are theirs: a key is
taken for ours by its words, by a setting's name, or by the settings that it holds.
"""

from __future__ import annotations

import json
import re
from dataclasses import fields
from typing import Any

from vllm_sink.policy.config import SECTION, SinkConfig
from vllm_sink.start.must import must

_SETTINGS = frozenset(field.name for field in fields(SinkConfig))
# Settings that another plugin may well have under the same name.
_COMMON = frozenset({"window_size", "triton_interpreter"})
# Words beside "sink" that leave a key ours: "sinkhorn" and "log_sink" are others'.
_FILLER = (
    "(?:args|attention|attn|cache|cfg|config|configuration|kv|options|params|policy|"
    "section|settings|tokens?|vllm|window)*"
)
_NAMES_US = re.compile(f"{_FILLER}sinks?{_FILLER}")


def refuse_lookalikes(additional_config: Any, *, selected: bool) -> None:
    """Refuse keys that look like the section, or like one of its settings.

    Args:
        selected: The backend is selected. Else only a key that holds our settings
            counts: nobody asked for a policy.

    Raises:
        ValueError: Names the key, its value and how to write it.
    """
    if not isinstance(additional_config, dict):
        return
    for key, value in additional_config.items():
        if key == SECTION:
            continue
        is_setting = selected and key in _SETTINGS
        if not (is_setting or _holds_settings(value) or (selected and _names_us(key))):
            continue
        shown = f"{key!r} with value {value!r}"
        remedy = f"rename it to {SECTION!r}"
        if is_setting:
            section = json.dumps({SECTION: {key: value}}, default=repr)
            remedy = f"write it in the section: {section}"
        elif SECTION in additional_config:
            remedy = f"merge it into {SECTION!r}"
        must(
            False,
            f"additional_config.{key if str(key).isprintable() else repr(key)}",
            f"be the section {SECTION!r} where it means the sink policy",
            shown,
            remedy,
        )


def _names_us(key: Any) -> bool:
    letters = re.sub("[^a-z]", "", str(key).lower())
    return _NAMES_US.fullmatch(letters) is not None


def _holds_settings(value: Any) -> bool:
    return isinstance(value, dict) and bool((_SETTINGS - _COMMON) & value.keys())
