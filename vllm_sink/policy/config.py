"""The ``sink`` section of vLLM's ``additional_config``.

``--additional-config '{"sink": {"num_sink_tokens": 4, "window_size": 1024}}'``
on the command line, the same dict as ``LLM(additional_config=...)``. vLLM
carries ``additional_config`` to every process, Ray workers included, which
environment variables don't reach. Whether an engine can honour them is asked in
:mod:`vllm_sink.policy.refusals`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from vllm_sink.policy.layout import RetentionPolicy

SECTION = "sink"
SinkPositions = Literal["cache", "absolute"]


@dataclass(frozen=True)
class SinkConfig:
    """The policy, as the user gives it.

    Args:
        num_sink_tokens: S >= 0; 0 is a plain sliding window.
        window_size: W >= 1, the query's own position included. S + W at or
            above ``max_model_len`` is full attention.
        sink_positions: ``cache`` caps a sink's distance at S+W-1, so distances
            stay within the trained range on endless streams; ``absolute``
            leaves it as it is.
        triton_interpreter: For debugging and tests: the CPU serves through the GPU
            path, its kernels interpreted (milliseconds a program, fp32 or fp16).
            Needs ``TRITON_INTERPRET=1`` in the environment.
    """

    num_sink_tokens: int = 4
    window_size: int = 1024
    sink_positions: SinkPositions = "cache"
    triton_interpreter: bool = False

    def __post_init__(self) -> None:
        _require_int("num_sink_tokens", self.num_sink_tokens, minimum=0)
        _require_int("window_size", self.window_size, minimum=1)
        if self.sink_positions not in ("cache", "absolute"):
            raise ValueError(
                f"sink.sink_positions must be 'cache' or 'absolute', got "
                f"{self.sink_positions!r}; 'cache' suits streams past the trained "
                "length"
            )
        if not isinstance(self.triton_interpreter, bool):
            raise ValueError(
                "sink.triton_interpreter must be true or false, got "
                f"{self.triton_interpreter!r}; leave it out to serve normally"
            )

    @property
    def policy(self) -> RetentionPolicy:
        """The retention policy of the full-attention layers."""
        return RetentionPolicy(self.num_sink_tokens, self.window_size)

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> SinkConfig:
        """Parse ``additional_config["sink"]``; defaults where it is absent.

        Raises:
            ValueError: An unknown key or a value out of range, by name.
        """
        section = (
            additional_config.get(SECTION, {})
            if isinstance(additional_config, dict)
            else {}
        )
        if not isinstance(section, dict):
            raise ValueError(
                f"additional_config.{SECTION} must be a dict, got {section!r}; pass "
                """for example {"sink": {"num_sink_tokens": 4}}"""
            )
        known = [field.name for field in fields(cls)]
        for key in section:
            if key not in known:
                raise ValueError(
                    f"{SECTION}.{key} must be one of {', '.join(known)}, got the "
                    f"unknown key {key!r} with value {section[key]!r}; remove or "
                    "rename it"
                )
        return cls(**section)


def _require_int(name: str, value: Any, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(
            f"sink.{name} must be an integer >= {minimum}, got {value!r}; give a "
            f"number of tokens of at least {minimum}"
        )
