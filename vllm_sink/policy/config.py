"""The ``sink`` section of vLLM's ``additional_config``.

``--additional-config '{"sink": {"num_sink_tokens": 4, "window_size": 4092}}'``
on the command line, the same dict as ``LLM(additional_config=...)``. vLLM
carries ``additional_config`` to every process, Ray workers included, which
environment variables don't reach. Whether an engine can honour them is asked in
:mod:`vllm_sink.start.checks`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from vllm_sink.policy.head_map import HeadMap, check_fraction, select
from vllm_sink.policy.layout import RetentionPolicy

SECTION = "sink"
SinkPositions = Literal["cache", "absolute"]


@dataclass(frozen=True)
class SinkConfig:
    """The settings of the policy.

    Args:
        num_sink_tokens: S >= 0; 0 is a plain sliding window.
        window_size: W >= 1, the query's own position included. S + W at or
            above ``max_model_len`` is full attention.
        sink_positions: ``cache`` caps a sink's distance at S+W-1, so distances
            stay within the trained range on endless streams; ``absolute``
            leaves it as it is.
        retrieval_heads: Which KV heads keep more than the policy: a score for each,
            [layers][KV heads], or the path of a pattern file, or paths of several
            (:mod:`vllm_sink.settings.pattern_files` lists the formats). None: no head.
        retrieval_fraction: 0 to 1, how many KV heads are retrieval heads, the best
            by score, whatever its scale. None: what the JSON that belongs to the file
            recommends, else those with a score of at least 0.5 of 0 to 1.
        retrieval_layers: Layers whose KV heads are all retrieval heads.
        retrieval_window_size: W of the retrieval heads; None keeps everything.
        triton_interpreter: For debugging and tests: the CPU serves through the GPU
            path, its kernels interpreted (milliseconds a program, fp32 or fp16).
            Needs ``TRITON_INTERPRET=1`` in the environment.
    """

    num_sink_tokens: int = 4
    window_size: int = 4092
    sink_positions: SinkPositions = "cache"
    retrieval_heads: Any = None
    retrieval_fraction: float | None = None
    retrieval_layers: tuple[int, ...] | None = None
    retrieval_window_size: int | None = None
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
        self._check_retrieval()
        if not isinstance(self.triton_interpreter, bool):
            raise ValueError(
                "sink.triton_interpreter must be true or false, got "
                f"{self.triton_interpreter!r}; leave it out to serve normally"
            )

    def _check_retrieval(self) -> None:
        layers = self.retrieval_layers
        if layers is not None:
            if not isinstance(layers, (list, tuple)) or any(
                isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in layers
            ):
                raise ValueError(
                    "sink.retrieval_layers must be a list of layer indices from 0, got "
                    f"{layers!r}; write for example [0, 5]"
                )
            object.__setattr__(self, "retrieval_layers", tuple(layers))
        if self.retrieval_fraction is not None:
            check_fraction(self.retrieval_fraction, "sink.retrieval_fraction")
            if self.retrieval_heads is None:
                raise ValueError(
                    "sink.retrieval_fraction must be left out without "
                    f"sink.retrieval_heads, got {self.retrieval_fraction!r}; give a "
                    "pattern file to choose from: `vllm-sink heads` writes one"
                )
        if self.retrieval_window_size is not None:
            _require_int("retrieval_window_size", self.retrieval_window_size, minimum=1)
            if not self.has_retrieval:
                raise ValueError(
                    "sink.retrieval_window_size must be left out without "
                    "sink.retrieval_heads or sink.retrieval_layers, got "
                    f"{self.retrieval_window_size!r}; say which heads it is for"
                )

    @property
    def has_retrieval(self) -> bool:
        """Whether the settings ask for retrieval heads; there may be none."""
        return self.retrieval_heads is not None or self.retrieval_layers is not None

    @property
    def head_map(self) -> HeadMap | None:
        """The chosen heads; None without. Settings must be resolved."""
        if not self.has_retrieval:
            return None
        assert isinstance(self.retrieval_heads, (list, tuple)), (
            "retrieval_heads are resolved where the engine is configured, got "
            f"{self.retrieval_heads!r}"
        )
        return select(self.retrieval_heads)

    @property
    def retrieval_policy(self) -> RetentionPolicy | None:
        """The policy of the retrieval heads; None keeps everything."""
        if self.retrieval_window_size is None:
            return None
        return RetentionPolicy(self.num_sink_tokens, self.retrieval_window_size)

    @property
    def policy(self) -> RetentionPolicy:
        """The retention policy of the full-attention layers."""
        return RetentionPolicy(self.num_sink_tokens, self.window_size)

    def clipped(self, max_model_len: int) -> SinkConfig:
        """These settings for requests of at most ``max_model_len`` tokens.

        Heads of two kinds whose windows are then equal are of one kind: the settings
        come back without retrieval heads.
        """
        policy = self.policy.clipped(max_model_len)
        own = self.retrieval_window_size
        own = None if own is None else min(own, max_model_len)
        clipped = replace(
            self,
            num_sink_tokens=policy.num_sink_tokens,
            window_size=policy.window_size,
            retrieval_window_size=own,
        )
        if own != policy.window_size:
            return clipped
        return replace(
            clipped,
            retrieval_heads=None,
            retrieval_fraction=None,
            retrieval_layers=None,
            retrieval_window_size=None,
        )

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
                shown = key if str(key).isprintable() else repr(key)
                raise ValueError(
                    f"{SECTION}.{shown} must be one of {', '.join(known)}, got the "
                    f"unknown key {key!r} with value {section[key]!r}; remove or "
                    "rename it"
                )
        return cls(**section)


def has_section(additional_config: Any) -> bool:
    """Whether ``additional_config`` has a section, whatever it says."""
    return isinstance(additional_config, dict) and SECTION in additional_config


def _require_int(name: str, value: Any, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(
            f"sink.{name} must be an integer >= {minimum}, got {value!r}; give a "
            f"number of tokens of at least {minimum}"
        )
