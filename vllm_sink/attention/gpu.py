"""The GPU path in one layer: cache write, decode and prefill, all in Triton.

The cache write is the project's own: vLLM's ``reshape_and_cache_flash`` does the
same on a GPU, but does not run where these kernels are interpreted.

What a launch needs is checked and worked out once for each layout of the layer's
tensors (:class:`Launchers`); a step passes pointers and sizes. Layers whose KV heads
are of two kinds launch the same kernels, which read each head's cache, block table,
slots, S and W from a table on the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from vllm.platforms import current_platform
from vllm_sink_kernels.triton import launch_config
from vllm_sink_kernels.triton.arguments import AttentionArgs, Pointers
from vllm_sink_kernels.triton.cache_write import WriteLauncher
from vllm_sink_kernels.triton.decode import DecodeLauncher, workspace_shape
from vllm_sink_kernels.triton.head_table import HeadTable
from vllm_sink_kernels.triton.prefill import PrefillLauncher

from vllm_sink.attention.base import SinkImplBase, Step
from vllm_sink.attention.gpu_flash import FlashPrefill
from vllm_sink.attention.gpu_plan import SinkGpuMetadata
from vllm_sink.attention.gpu_support import FP8_KV_CACHE_DTYPES
from vllm_sink.rotation.head_counts import refuse_other_heads


class Launchers(NamedTuple):
    """A layer's launches for tensors of one layout."""

    write: WriteLauncher
    decode: DecodeLauncher
    prefill: PrefillLauncher
    flash: FlashPrefill


class SinkGpuImpl(SinkImplBase[SinkGpuMetadata]):
    """One layer's attention in Triton."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._workspace: torch.Tensor | None = None
        # Views of the cache that vLLM bound, and what they were made of.
        self._cache_key: Any = None
        self._k_cache: torch.Tensor = torch.tensor([])
        self._v_cache: torch.Tensor = torch.tensor([])
        self._launchers: dict[Any, Launchers] = {}
        # Addresses of block tables and slots (``step.places``) -> the table that holds
        # them. CUDA graphs hold on to tables: none is changed, or dropped while the
        # caches stay.
        self._head_tables: dict[Any, HeadTable] = {}

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SinkGpuMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write this step's K and V, then attend.

        Args:
            layer: Its ``_k_scale`` and ``_v_scale`` belong to an fp8 cache.
            query, output: [T, HQ, D]. key, value: [T, HKV, D].
            kv_cache: [B, HKV, N, 2D] in any of vLLM's layouts; K, then V. Of heads
                of two kinds it is the first head's, and not used.
            attn_metadata: None while vLLM profiles.
        """
        if output_scale is not None or output_block_scale is not None:
            raise ValueError(
                "output quantization must not be fused into attention with "
                "--attention-backend sink, got an output scale; turn off the "
                "fuse_attn_quant pass"
            )
        if key is not None and len(key) != len(query):
            name = layer.layer_name
            refuse_other_heads(name, self, len(query), len(query), len(key))
        if attn_metadata is None:
            self._reserve_workspace(query.device)  # so that vLLM counts it
            return output.zero_()
        plan, heads = attn_metadata, None
        block_table, rows = plan.block_table, None
        if self.heads is not None:
            heads = self.find_head_table(plan.step)
            k_cache, v_cache = heads.k_cache, heads.v_cache
            block_table, rows = heads.block_table, heads.rows
        else:
            k_cache, v_cache = self._cache_views(kv_cache)
        launch = self._find_launchers(
            layer, plan, query, key, value, k_cache, v_cache, output, heads
        )
        if self.writes_cache and key is not None:
            launch.write(key, value, k_cache, v_cache, plan.slot_mapping, rows)
        pointers: Pointers = {
            "q_ptr": query,
            "k_ptr": k_cache,
            "v_ptr": v_cache,
            "block_table_ptr": block_table,
            "heads_ptr": rows,
            "out_ptr": output,
        }
        split, end = plan.num_decode_tokens, plan.num_tokens
        if split > 0:
            launch.decode(
                pointers, plan.query_positions, plan.query_requests, self._workspace
            )
        if split < end:
            if plan.has_prefill_padding:
                output[split:end].zero_()
            if not launch.flash.run(pointers, plan):
                launch.prefill(
                    pointers,
                    plan.query_start_loc,
                    plan.seq_lens,
                    end,
                    plan.num_decodes,
                    split,
                )
        return output

    def _find_launchers(
        self,
        layer: Any,
        plan: SinkGpuMetadata,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        output: torch.Tensor,
        heads: HeadTable | None,
    ) -> Launchers:
        """Those for tensors of this layout; checks them the first time."""
        scales = None
        if self.kv_cache_dtype in FP8_KV_CACHE_DTYPES:
            scales = layer._k_scale, layer._v_scale
        layout = (
            query.stride(),
            output.stride(),
            None if key is None or value is None else (key.stride(), value.stride()),
            plan.block_table.stride(),
            self._cache_key,
            None if scales is None else (scales[0].data_ptr(), scales[1].data_ptr()),
        )
        launchers = self._launchers.get(layout)
        if launchers is not None:
            return launchers
        k_scale, v_scale = scales or (1.0, 1.0)
        rotation = self.rotation
        args = AttentionArgs(
            q=query,
            k_cache=k_cache,
            v_cache=v_cache,
            block_table=plan.block_table if heads is None else heads.block_table,
            out=output,
            scale=self.scale,
            num_sink_tokens=plan.policy.num_sink_tokens,
            window_size=plan.policy.window_size,
            cos_sin_cache=None if rotation is None else rotation.rows,
            is_neox=rotation is None or rotation.is_neox,
            soft_cap=self.soft_cap,
            sink_logits=self.sink_logits,
            k_scale=k_scale,
            v_scale=v_scale,
            heads=heads,
        )
        if (
            key is None or value is None
        ):  # the layer reads another's cache: nothing is written
            key = value = query[:, : self.num_kv_heads]
        self._reserve_workspace(query.device)
        launchers = Launchers(
            WriteLauncher(key, value, k_cache, v_cache, k_scale, v_scale, heads),
            DecodeLauncher(args),
            PrefillLauncher(args),
            FlashPrefill(args),
        )
        self._launchers[layout] = launchers
        return launchers

    def find_head_table(self, step: Step) -> HeadTable:
        """The layer's table for the block tables and slots of this step.

        vLLM keeps both where they are, so it is made once; the builder asks before a
        layer runs, since making it waits for the device.
        """
        assert self.heads is not None, "heads of one kind need no table"
        # vLLM binds other caches after it has profiled CUDA graphs on small ones.
        caches = tuple([head.kv_cache.data_ptr() for head in self.heads])
        if caches != self._cache_key:
            self._cache_key = caches
            self._launchers.clear()
            self._head_tables.clear()
        table = self._head_tables.get(step.places)
        if table is None:
            parts = [step.parts[head.group.index] for head in self.heads]
            views = [self._split(head.kv_cache) for head in self.heads]
            table = HeadTable.build(
                [k for k, _ in views],
                [v for _, v in views],
                [part.block_table for part in parts],
                [part.slot_mapping for part in parts],
                [
                    (part.policy.num_sink_tokens, part.policy.window_size)
                    for part in parts
                ],
            )
            self._head_tables[step.places] = table
        return table

    def _reserve_workspace(self, device: torch.device) -> None:
        """Scratch for decode's splits, a few MB; of no step's size.

        An engine's layers share it: they run one after another on one stream.
        """
        if self._workspace is None:
            (elements,) = workspace_shape(
                self.num_heads,
                self.head_size,
                1 if self.heads is not None else self.num_kv_heads,
                launch_config.num_cores(device),
            )
            shared = self.scratch.get((device, elements))
            if shared is None:
                shared = torch.empty(elements, dtype=torch.float32, device=device)
                self.scratch[device, elements] = shared
            self._workspace = shared

    def _cache_views(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [B, N, HKV, D] of the cache, by strides; made once."""
        cache_key = kv_cache.data_ptr(), kv_cache.stride()
        if cache_key != self._cache_key:
            self._cache_key = cache_key
            self._launchers.clear()
            self._k_cache, self._v_cache = self._split(kv_cache)
        return self._k_cache, self._v_cache

    def _split(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.kv_cache_dtype in FP8_KV_CACHE_DTYPES:
            kv_cache = kv_cache.view(current_platform.fp8_dtype())
        k_cache, v_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return k_cache, v_cache
