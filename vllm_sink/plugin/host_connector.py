"""What vLLM calls: ``--kv-transfer-config`` with the connector ``SinkHostCache``.

Every method is one of vLLM's documented connector interface; none that is private is
overridden. Loads are asynchronous, since only then can vLLM be told that a request's
load failed as a whole: after a gap, it can't be computed anew from the middle.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from vllm_sink.cache.host.scheduler import Copies, HostScheduler
from vllm_sink.cache.host.worker import HostWorker, slot_bytes
from vllm_sink.start.host_cache import check_layers, host_bytes, host_line

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.plugins.sink")


@dataclass
class HostMetadata(KVConnectorMetadata):
    """A step's copies, on their way to the workers."""

    copies: Copies = field(default_factory=Copies)


class SinkHostCache(KVConnectorBase_V1, SupportsHMA):
    """Host memory behind the pool of one engine; see :mod:`vllm_sink.cache.host`.

    One object in the scheduler's process and one in each worker's, as vLLM has it.
    """

    _cache_hit_source = CacheHitSource.HOST

    def __init__(
        self,
        vllm_config: VllmConfig,
        role: KVConnectorRole,
        kv_cache_config: KVCacheConfig,
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check_layers(kv_cache_config)
        num_workers = vllm_config.parallel_config.world_size
        per_worker = slot_bytes(kv_cache_config)
        share = host_bytes(vllm_config.kv_transfer_config) // num_workers
        num_slots = share // per_worker
        if role == KVConnectorRole.WORKER:
            self.worker = HostWorker(kv_cache_config, num_slots)
            return
        # vLLM reads it once the connector is made. Its default ends the request; a
        # mirror's loss is no loss.
        self._kv_transfer_config.kv_load_failure_policy = "recompute"
        self.start_line = host_line(vllm_config, kv_cache_config, num_slots)
        logger.info("%s", self.start_line)
        self.scheduler = HostScheduler(num_slots, per_worker * num_workers)

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # nobody waits for what is saved

    # -- the scheduler's ------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self.scheduler.bind(kv_cache_manager)

    def on_new_request(self, request: Request) -> None:
        self.scheduler.add_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        num_tokens = self.scheduler.match(request, num_computed_tokens)
        return num_tokens, num_tokens > 0

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        self.scheduler.start_load(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> HostMetadata:
        counts = scheduler_output.num_scheduled_tokens
        return HostMetadata(self.scheduler.take_copies(counts))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self.scheduler.end_loads(
            connector_output.finished_recving or (), connector_output.failed_recving
        )

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.scheduler.end_request(request), None

    def reset_cache(self) -> bool | None:
        self.scheduler.reset()
        return True

    # -- a worker's -----------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.worker.register(kv_caches)

    @property
    def _copies(self) -> Copies:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, HostMetadata)
        return metadata.copies

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self.worker.load(self._copies)

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass  # vLLM schedules a request when its load has ended

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: Any,
        **kwargs: Any,
    ) -> None:
        pass  # saved with the step, in wait_for_save()

    def wait_for_save(self) -> None:
        self.worker.save(self._copies)

    def get_transfer_results(
        self, finished_req_ids: set[str]
    ) -> KVConnectorTransferResults:
        ended, failed = self.worker.take_ended()
        # With a drafter vLLM asks before the step's saves; their blocks are free for
        # the next step's kernels, which follow the saves.
        return KVConnectorTransferResults(
            finished_sending=set(self._copies.ended),
            finished_recving=ended,
            failed_recving=failed,
        )
