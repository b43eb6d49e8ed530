"""KV cache specs of layers and heads under the policy."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)

from vllm_sink.policy.config import SinkConfig
from vllm_sink.policy.layout import RetentionPolicy

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class SlotSpec(FullAttentionSpec):
    """Full attention of a slot's heads, before it gets its policy.

    Args:
        part: The group of its kind that the slot is in, for vLLM's grouping: slots of
            several parts are layers of several kinds to it, and so get a group each.
            A group's own spec says 0.
    """

    part: int = 0


@dataclass(frozen=True, kw_only=True)
class SinkSpec(SlidingWindowSpec):
    """A sliding window whose first ``num_sink_tokens`` tokens never leave.

    Subclassing :class:`SlidingWindowSpec` gives vLLM's recycling-aware pool
    sizing and admission cap: both read ``max_admission_blocks_per_request``. The
    rest of vLLM 0.32 and 0.33 supposes that a ``SlidingWindowSpec`` skips a
    request's *head*; here the head is the sinks, which stay:

    - the manager's allocation, hits and cache masks: overridden in
      :mod:`vllm_sink.cache.block_manager`;
    - 0.33's runner V2 nulls the head of a row: :attr:`num_retained_tokens`;
    - 0.33's ``trim_null_head`` (freeing, blocks to zero) trims nulls in front only:
      ours stand in the middle, stay in the list and are skipped one by one;
    - ``_promote_local_kv_cache_specs`` (``--disable-hybrid-kv-cache-manager``) makes
      it a ``FullAttentionSpec`` beside one of those: refused at start;
    - KV connectors and offloading give up the head: refused at start, but ours;
    - ``kv_cache_spec_kind`` calls it ``sliding_window`` in KV events and in the
      engine's group metadata: a router that reads those knows nothing of the sinks;
    - ``extra_retained_tokens`` (several speculative modules) widens the window:
      :attr:`policy` counts it.

    Runner V1, V2's speculators, CUDA graphs and retention intervals ask for the
    class, or for W, and suppose nothing of a head.

    Grouping does not tell a subclass from its base: every predicate of it (one group
    for all layers, promotion, the packing of unequal pages, 0.33's planning) asks the
    *first* spec whether the others are like it, and a ``SlidingWindowSpec`` says yes
    to a ``SinkSpec`` of its W, which then is managed as a plain window and loses its
    sinks. So no layer of this backend has vLLM's own class: a window of the model's
    own is an :class:`OwnWindowSpec`. Whatever gets past that ends the start:
    :mod:`vllm_sink.start.groups`.

    Args:
        num_sink_tokens: S, tokens.
        sliding_window: W, tokens, the query's own included (inherited).
        is_retrieval: These are retrieval heads with a window of their own.
        num_layers: Layers that share the group's block table, once vLLM has merged
            their specs into the group's. 0 where it didn't: layers whose pages
            differ in size keep their specs, and the manager gets any one of them.
        part: As :attr:`SlotSpec.part`.
    """

    num_sink_tokens: int
    is_retrieval: bool = False
    part: int = 0
    num_layers: int = field(default=0, compare=False)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """The spec of a group, with its layers counted; may be merged again."""
        merged = super().merge(specs)  # an AssertionError tells vLLM: not one group
        count = sum(spec.num_layers or 1 for spec in specs)
        return replace(merged, num_layers=count, part=0)

    @classmethod
    def from_full(
        cls,
        spec: FullAttentionSpec,
        config: SinkConfig,
        window_size: int | None = None,
    ) -> SinkSpec:
        """The sink spec of a layer that would have had full attention.

        Args:
            window_size: W of retrieval heads; None for the policy's.
        """
        return cls(
            block_size=spec.block_size,
            dcp_sharded=spec.dcp_sharded,
            max_tp_shards=spec.max_tp_shards,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            head_size_v=spec.head_size_v,
            dtype=spec.dtype,
            kv_quant_mode=spec.kv_quant_mode,
            page_size_padded=spec.page_size_padded,
            num_head_slots=spec.num_head_slots,
            state_content_bytes=spec.state_content_bytes,
            tokens_per_state=spec.tokens_per_state,
            sliding_window=window_size or config.window_size,
            num_sink_tokens=config.num_sink_tokens,
            is_retrieval=window_size is not None,
            part=_part_of(spec),
        )

    @property
    def policy(self) -> RetentionPolicy:
        """The policy, with the extra tokens that vLLM asks to retain."""
        return RetentionPolicy(
            self.num_sink_tokens, self.sliding_window + self.extra_retained_tokens
        )

    @property
    def num_retained_tokens(self) -> int:
        """0: no entry of a block table is nulled, the sinks' least of all.

        vLLM 0.33's runner V2 (the default on CUDA) points every entry below
        ``num_computed_tokens - num_retained_tokens`` at the null block, block 0,
        because a sliding window never reads a skipped head. Here the head is the
        sinks. 0 switches that off; our kernels never read the gap's entries, so
        stale ids there do no harm. vLLM 0.32 does not have the property. Seen by
        tests/runner_v2.
        """
        return 0

    def max_admission_blocks_per_request(
        self, max_in_flight_tokens: int, max_model_len: int
    ) -> int:
        """Most blocks a request holds; see :meth:`RetentionPolicy.max_blocks`."""
        return self.policy.max_blocks(
            max_in_flight_tokens, max_model_len, self.block_size
        )

    def is_uniform_with_collection(
        self, kv_cache_specs: dict[str, KVCacheSpec]
    ) -> bool:
        return all(
            isinstance(spec, SinkSpec)
            and spec.policy == self.policy
            and spec.is_retrieval == self.is_retrieval
            and spec.part == self.part
            for spec in kv_cache_specs.values()
        )


@dataclass(frozen=True, kw_only=True)
class OwnWindowSpec(SlidingWindowSpec):
    """A layer with a window of its own, never in a group with a :class:`SinkSpec`.

    vLLM's own manager serves it.
    """

    @classmethod
    def from_window(cls, spec: SlidingWindowSpec) -> OwnWindowSpec:
        return cls(**_fields_of(spec))

    def is_uniform_with_collection(
        self, kv_cache_specs: dict[str, KVCacheSpec]
    ) -> bool:
        return all(
            isinstance(spec, OwnWindowSpec)
            and spec.sliding_window == self.sliding_window
            for spec in kv_cache_specs.values()
        )


@dataclass(frozen=True, kw_only=True)
class RetrievalSpec(FullAttentionSpec):
    """Full attention of retrieval heads, whose manager counts its blocks.

    Args:
        part: As :attr:`SlotSpec.part`.
    """

    part: int = 0

    @classmethod
    def from_full(cls, spec: FullAttentionSpec) -> RetrievalSpec:
        return cls(**_fields_of(spec))

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """The spec of a group; vLLM would merge a subclass with its base."""
        assert all(isinstance(spec, RetrievalSpec) for spec in specs), specs
        assert len({spec.part for spec in specs}) == 1, specs
        return super().merge(specs)  # makes it anew, of vLLM's own fields: part 0

    def is_uniform_with_collection(
        self, kv_cache_specs: dict[str, KVCacheSpec]
    ) -> bool:
        return all(
            isinstance(spec, RetrievalSpec) and spec.part == self.part
            for spec in kv_cache_specs.values()
        )


def _part_of(spec: FullAttentionSpec) -> int:
    return spec.part if isinstance(spec, SlotSpec) else 0


def _fields_of(spec: KVCacheSpec) -> dict[str, Any]:
    return {field.name: getattr(spec, field.name) for field in fields(spec)}
