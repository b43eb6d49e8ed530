"""The ``sink`` section of vLLM's ``additional_config``.

``--additional-config '{"sink": {"num_sink_tokens": 4, "window_size": 1024}}'``
on the command line, the same dict as ``LLM(additional_config=...)``. vLLM
carries ``additional_config`` to every process, Ray workers included, which
environment variables don't reach.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from vllm_sink.policy.layout import RetentionPolicy

if TYPE_CHECKING:
    from vllm.config import VllmConfig

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


def is_selected(vllm_config: VllmConfig) -> bool:
    """Whether ``--attention-backend sink`` was given (for any group of layers)."""
    attention = vllm_config.attention_config
    chosen = [attention.backend, *(attention.backend_per_kind or {}).values()]
    return any(getattr(backend, "name", None) == "SINK" for backend in chosen)


def validate_engine(vllm_config: VllmConfig) -> SinkConfig:
    """Refuse settings that the sink policy cannot honour.

    Raises:
        ValueError: Names the setting, its value and the remedy.
    """
    config = SinkConfig.from_additional_config(vllm_config.additional_config)
    parallel = vllm_config.parallel_config
    for name, size in (
        ("decode_context_parallel_size", parallel.decode_context_parallel_size),
        ("prefill_context_parallel_size", parallel.prefill_context_parallel_size),
    ):
        if size > 1:
            raise ValueError(
                f"{name} must be 1 with --attention-backend sink, got {size}; a "
                "bounded context needs no context parallelism: use tensor "
                "parallelism"
            )
    if vllm_config.kv_transfer_config is not None:
        connector = vllm_config.kv_transfer_config.kv_connector
        if connector is not None:
            raise ValueError(
                "kv_connector must be unset with --attention-backend sink, got "
                f"{connector!r}; connectors assume append-only blocks: drop "
                "--kv-transfer-config"
            )
    model = vllm_config.model_config
    if model is not None:
        if model.use_mla:
            raise ValueError(
                f"model must not use MLA with --attention-backend sink, got "
                f"{model.model!r}; serve it with vLLM's own MLA backend"
            )
        if model.is_encoder_decoder:
            raise ValueError(
                "model must be decoder-only with --attention-backend sink, got the "
                f"encoder-decoder {model.model!r}; drop --attention-backend sink"
            )
    if config.triton_interpreter:
        _require_interpreter(model)
    return config


def _require_interpreter(model: Any) -> None:
    """Refuse ``triton_interpreter`` where the kernels would not be interpreted."""
    import torch
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise ValueError(
            "sink.triton_interpreter must be false on a GPU, got true; it is for "
            "machines without one: remove it"
        )
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted:
        import triton.language as tl

        # Triton decorates its own library as it is imported.
        interpreted = type(tl.cdiv).__name__ == "InterpretedFunction"
    if not interpreted:
        raise ValueError(
            "TRITON_INTERPRET must be 1 before Triton is imported with "
            "sink.triton_interpreter, got "
            f"{os.environ.get('TRITON_INTERPRET')!r} then or now; set it in the "
            "environment of the process"
        )
    if model is not None and model.dtype == torch.bfloat16:
        raise ValueError(
            "dtype must be float32 or float16 with sink.triton_interpreter, got "
            "bfloat16, which Triton's interpreter multiplies wrongly; pass --dtype "
            "float32"
        )
