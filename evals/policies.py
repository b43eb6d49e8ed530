"""Cache policies by name, and engines under them.

::

    dense                  stock attention, everything kept
    window                 the last S+W tokens: no sinks (sliding window)
    sink                   S sinks and a window of W
    sink:16+1008           S and W given
    sink:4+1020:absolute   and sink positions too
    heads:FILE@F           as sink, but the best share F of FILE's heads keeps all
    heads:FILE@F:4+252:absolute
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

_SINK = re.compile(r"sink:(\d+)\+(\d+)(?::(cache|absolute))?")
_HEADS = re.compile(
    r"heads:(?P<file>.+?)@(?P<fraction>[\d.]+)"
    r"(?::(?P<sinks>\d+)\+(?P<window>\d+))?(?::(?P<positions>cache|absolute))?"
)


@dataclass(frozen=True)
class Policy:
    """A cache policy; ``num_sink_tokens`` is None for stock attention.

    Args:
        retrieval_heads: A pattern file.
        retrieval_fraction: The share of its heads that keeps everything.
        retrieval_layers: Layers that keep everything; no name says them.
    """

    name: str
    num_sink_tokens: int | None = None
    window_size: int | None = None
    sink_positions: str | None = None
    retrieval_heads: str | None = None
    retrieval_fraction: float | None = None
    retrieval_layers: tuple[int, ...] | None = None

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
        match = _HEADS.fullmatch(text)
        if match is not None:
            given = match.groupdict()
            return cls(
                text,
                int(given["sinks"] or num_sink_tokens),
                int(given["window"] or window_size),
                given["positions"] or "cache",
                given["file"],
                float(given["fraction"]),
            )
        match = _SINK.fullmatch(text)
        if match is None:
            raise ValueError(
                "policy must be dense, window, sink, sink:S+W[:cache|absolute] or "
                f"heads:FILE@F, got {text!r}; for example sink:4+1020:absolute or "
                "heads:heads.tsv@0.25"
            )
        sinks, window, positions = match.groups()
        return cls(text, int(sinks), int(window), positions or "cache")

    def engine_args(self) -> dict[str, Any]:
        """Arguments for ``LLM`` that put the policy in force."""
        if self.num_sink_tokens is None:
            return {}
        section = {
            key: value for key, value in asdict(self).items() if value is not None
        }
        del section["name"]
        return {"attention_backend": "sink", "additional_config": {"sink": section}}

    def open_engine(
        self, model: str, max_model_len: int, max_num_batched_tokens: int = 2048
    ):
        """An fp32 engine under the policy, for texts of ``max_model_len`` tokens.

        A context manager. The rotary table is lengthened where the model's own is
        shorter.
        """
        from tests.helpers.engine import sink_engine
        from vllm_sink.rotation.table_length import overrides_for

        return sink_engine(
            model,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            hf_overrides=overrides_for(model, max_model_len),
            **self.engine_args(),
        )

    @property
    def budget(self) -> int | None:
        """S + W, the tokens that every head can see; None is all of them."""
        if self.num_sink_tokens is None or self.window_size is None:
            return None
        if self.retrieval_fraction == 1:
            return None
        return self.num_sink_tokens + self.window_size
