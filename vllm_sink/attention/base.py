"""The common part of the CPU path and the GPU path: policy, rotation, settings.

The engine's record (:mod:`vllm_sink.engine`) has the policy; ``customize_spec`` puts
it into the spec, which is pickled to the engine core. :class:`SinkBuilderBase` checks
that spec and record agree, and tells each layer how its keys were rotated.

Heads of two policies (:mod:`vllm_sink.cache.head_caches`): a layer's KV heads are in
several KV cache groups, each with a builder, a policy and a block table. A layer's
forward finds them so::

    impl.heads                        None, or a HeadCache for each KV head, in order
      head.kv_cache                   [B, 1, N, 2D], bound once; all of one shape,
                                      strides and dtype
      head.group.index                i: which part of the step is the head's group
    metadata.step                     the step that all groups' metadata share
      step.parts[i]                   metadata of group i: its policy, block table,
                                      slots. All are there when a layer runs.
      step.plan, step.places          what the CPU path, or the GPU path, makes of all
                                      parts, once a step

While vLLM drafts it builds the group of the drafter's heads alone: that step has one
part, which stands for the others, too (:attr:`Step.is_ready`).

A group's block table and slots are slices of buffers that vLLM allocates once, so
their addresses stay from step to step (a table of addresses can be made once and
used in CUDA graphs). A layer whose heads are of one kind has ``heads = None``; its
metadata's step then has that one part.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, TypeVar

import torch
from vllm.config import (
    VllmConfig,
    get_current_vllm_config_or_none,
    get_layers_from_vllm_config,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_sink.cache.draft_heads import refuse_scattered
from vllm_sink.cache.head_caches import HeadCache, HeadGroup, HeadGroups
from vllm_sink.cache.head_slots import HeadSlot
from vllm_sink.cache.spec import SinkSpec
from vllm_sink.engine import Engine
from vllm_sink.policy.config import SinkConfig
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.rotation.table import (
    RotaryTable,
    check_table,
    find_rotation,
    measured_rotation,
)

M = TypeVar("M")


class Step:
    """One step, as the builders of all groups of heads describe it.

    Args:
        key: An object that only this step's groups have.
        num_parts: Groups.

    Attributes:
        plan: The CPU path's plan of the step, once all parts are there.
        places: Where the GPU path finds each part's block table and slots: addresses.
    """

    def __init__(self, key: Any, num_parts: int) -> None:
        self.key = key
        self.parts: list[Any] = [None] * num_parts
        self.plan: Any = None
        self.places: tuple[tuple[int, int], ...] = ()

    @property
    def is_complete(self) -> bool:
        return all(part is not None for part in self.parts)

    def is_ready(self, is_drafters: bool) -> bool:
        """Whether layers may run: all parts are there, or a drafter's alone.

        Args:
            is_drafters: The last part is that of a drafter's heads.
        """
        known = sum(part is not None for part in self.parts)
        return known == len(self.parts) or (is_drafters and known == 1)

    def filled(self) -> list[Any]:
        """The parts, one that is known in place of those that are missing."""
        known = next(part for part in self.parts if part is not None)
        return [known if part is None else part for part in self.parts]


class SinkBuilderBase(AttentionMetadataBuilder[M]):
    """A metadata builder that knows its layers' policy and their keys' rotation."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.engine = Engine.of(vllm_config)
        config = self.engine.config
        self.engine.finish_loading(kv_cache_spec)
        self.layers: dict[str, Any] = get_layers_from_vllm_config(
            vllm_config, Attention, layer_names
        )
        # The group among those of heads; None: its layers' heads are of one kind.
        self.group: HeadGroup | None = None
        self.groups: HeadGroups | None = None
        layers: Any = get_layers_from_vllm_config(
            vllm_config, AttentionLayerBase, layer_names
        )
        heads = [x for x in layers.values() if isinstance(x, (HeadCache, HeadSlot))]
        is_named = bool(heads)
        if not is_named:  # a drafter's builder, of V1 for its first layer's name alone
            impls = [layer.impl for layer in self.layers.values()]
            own = [x for impl in impls for x in getattr(impl, "heads", None) or ()]
            heads = list(dict.fromkeys(head.entry for head in own))
        real = [head for head in heads if head.owners]
        # All of its heads are a drafter's; their layers read no other group.
        self.is_drafters = bool(real) and all(head.is_drafters for head in real)
        if real:
            self.groups = real[0].groups
            self.group = self.groups.register(heads)
            if not is_named and self.is_drafters:  # those of its other layers, too
                real = [x for x in self.group.heads if x.owners and x.is_drafters]
            owners = (owner for head in real for owner in head.owners)
            self.layers.update({owner.layer_name: owner for owner in owners})
            refuse_scattered(real)
        self.heads = real
        self._check_tables(vllm_config)
        self.block_size = kv_cache_spec.block_size
        # id of a rotary table -> the rotation, for tables that turns need.
        self.rotations: dict[int, RotaryTable] = {}
        if isinstance(kv_cache_spec, SinkSpec):
            max_model_len = vllm_config.model_config.max_model_len
            self.policy = RetentionPolicy(
                kv_cache_spec.num_sink_tokens, kv_cache_spec.sliding_window
            ).clipped(max_model_len)
            assert self.policy in (config.policy, config.retrieval_policy), (
                f"spec has {self.policy}, config has {config.policy} and "
                f"{config.retrieval_policy}"
            )
            self._find_rotations(config, max_model_len)
        elif kv_cache_spec.sliding_window is None:  # keeps everything
            self.policy = RetentionPolicy(0, vllm_config.model_config.max_model_len)
        else:
            windows = {layer.sliding_window for layer in self.layers.values()}
            assert len(windows) == 1, f"one group, several windows: {windows}"
            self.policy = RetentionPolicy(0, windows.pop())

    def _check_tables(self, vllm_config: VllmConfig) -> None:
        """Refuse a measured table that is a row short, whether or not it turns."""
        max_model_len = vllm_config.model_config.max_model_len
        for name, layer in self.layers.items():
            rotation = measured_rotation(self.engine, layer)
            if rotation is None:
                continue
            # A drafter is built under a copy of the target's attention config.
            is_drafter = layer.impl.attention_config is not vllm_config.attention_config
            model_config = None if is_drafter else vllm_config.model_config
            check_table(name, rotation, max_model_len, model_config)

    def _find_rotations(self, config: SinkConfig, max_model_len: int) -> None:
        reached = self.policy.budget < max_model_len
        if config.sink_positions == "absolute" or not config.num_sink_tokens:
            reached = False
        if not reached:
            return
        for name, layer in self.layers.items():
            rotation = find_rotation(self.engine, name, layer)
            if rotation is None:
                continue
            layer.impl.rotation = rotation
            self.rotations[id(rotation.rows)] = rotation

    def join_step(self, common: CommonAttentionMetadata, metadata: Any) -> Step:
        """Add a group's metadata to its step; the first group begins the step.

        vLLM builds group by group, from copies of one ``common`` that share the
        tensor compared here.
        """
        if self.group is None or self.groups is None:
            step, index = Step(common.query_start_loc, 1), 0
        else:
            step, index = self.groups.step, self.group.index
            is_new = step is None or step.key is not common.query_start_loc
            if is_new or step.parts[index] is not None:
                step = Step(common.query_start_loc, len(self.groups.groups))
                self.groups.step = step
        step.parts[index] = metadata
        metadata.step = step
        return step


class SinkImplBase(AttentionImpl[M]):
    """One layer's settings, as vLLM gives them to an attention backend."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        vllm_config = get_current_vllm_config_or_none()
        self.attention_config = vllm_config and vllm_config.attention_config
        # What layers of one engine share; a layer without one shares nothing.
        self.scratch: MutableMapping[Any, Any] = (
            Engine.of(vllm_config).scratch if vllm_config is not None else {}
        )
        if alibi_slopes is not None:
            raise ValueError(
                "model must not use ALiBi with --attention-backend sink, got "
                f"{len(alibi_slopes)} slopes; drop the flag"
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.scale = scale
        self.kv_cache_dtype = kv_cache_dtype
        self.soft_cap = logits_soft_cap or 0.0
        self.writes_cache = kv_sharing_target_layer_name is None
        # The layer whose keys it reads, whatever cache holds them.
        self.reads_keys_of = kv_sharing_target_layer_name
        self.sink_logits = sinks
        self.heads_counted = False  # against the model's: head_counts
        # A companion for each KV head if they are of two kinds: cache.head_caches.
        self.heads: tuple[HeadCache, ...] | None = None
        self.groups: HeadGroups | None = None  # the engine's, which live as long
        # Set by the builder, which sees the layers; None: no turn. The policies say
        # which heads turn, and where.
        self.rotation: RotaryTable | None = None
