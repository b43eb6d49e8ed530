"""What a policy's name means as arguments of vLLM's engine.

::

    dense                  stock attention, everything kept
    window                 the last S+W tokens: no sinks (sliding window)
    sink                   S sinks and a window of W
    sink:16+1008           S and W given
    sink:4+1020:absolute   and sink positions too
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

_SINK = re.compile(r"sink:(\d+)\+(\d+)(?::(cache|absolute))?")


@dataclass(frozen=True)
class Policy:
    """A cache policy; ``num_sink_tokens`` is None for stock attention."""

    name: str
    num_sink_tokens: int | None = None
    window_size: int | None = None
    sink_positions: str | None = None

    @classmethod
    def parse(cls, text: str, num_sink_tokens: int, window_size: int) -> Policy:
        """The policy called ``text``; S and W where the name leaves them out.

        Raises:
            ValueError: The name is none of the module's.
        """
        if text == "dense":
            return cls(text)
        if text == "window":
            return cls(text, 0, num_sink_tokens + window_size, "cache")
        if text == "sink":
            return cls(text, num_sink_tokens, window_size, "cache")
        match = _SINK.fullmatch(text)
        if match is None:
            raise ValueError(
                f"policy must be dense, window, sink or sink:S+W[:cache|absolute], got "
                f"{text!r}; for example sink:4+1020:absolute"
            )
        sinks, window, positions = match.groups()
        return cls(text, int(sinks), int(window), positions or "cache")

    def engine_args(self) -> dict[str, Any]:
        """Arguments for ``LLM`` that put the policy in force."""
        if self.num_sink_tokens is None:
            return {}
        section = asdict(self)
        del section["name"]
        return {"attention_backend": "sink", "additional_config": {"sink": section}}

    @property
    def budget(self) -> int | None:
        """S + W, the tokens that a query can see; None is all of them."""
        if self.num_sink_tokens is None or self.window_size is None:
            return None
        return self.num_sink_tokens + self.window_size
