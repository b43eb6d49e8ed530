"""A worker's half: copies blocks between its KV cache and host memory.

A pool's block is the same bytes for every group of layers (one group owns it at a
time), some in each *region* of vLLM's one allocation: a region is [blocks, bytes of a
block]. A slot of the host mirrors all of them, so nothing here knows layers, heads or
groups.

Each slot is numbered with the copy that filled it. A load names the number that it
expects: a slot that holds something else, or nothing, fails that load.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_sink.cache.host.scheduler import Copies

logger = logging.getLogger("vllm.plugins.sink")


def slot_bytes(config: KVCacheConfig) -> int:
    """Bytes of a block of the pool on one worker."""
    # Every tensor tells the size of the one allocation that it is placed in.
    return config.kv_cache_tensors[0].size // config.num_blocks


def find_regions(
    config: KVCacheConfig, kv_caches: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """[num_blocks, bytes] int8 each: all bytes of the pool's blocks, once.

    Groups of layers overlay each other: what starts at the same byte is the same.
    """
    regions: dict[int, torch.Tensor] = {}
    for tensor in config.kv_cache_tensors:
        name = next((name for name in tensor.layers if name in kv_caches), None)
        if name is None:
            continue
        cache = kv_caches[name]
        storage = torch.empty(0, dtype=torch.int8, device=cache.device).set_(
            cache.untyped_storage()
        )
        span = config.num_blocks * tensor.block_stride
        if tensor.layer_stride >= span:  # layer by layer, each with all blocks
            start = tensor.offset
            stop = start + len(tensor.layers) * tensor.layer_stride
        else:  # block by block, each with all layers
            start, stop = 0, span
        for region in storage[start:stop].view(
            -1, config.num_blocks, tensor.block_stride
        ):
            regions[region.data_ptr()] = region
    return list(regions.values())


class HostWorker:
    """See the module.

    Args:
        config: vLLM's, of this worker.
        num_slots: Blocks that host memory mirrors.
    """

    def __init__(self, config: KVCacheConfig, num_slots: int) -> None:
        self.config = config
        self.num_slots = num_slots
        self.copier: Copier | None = None
        self._serials = [0] * num_slots
        self._ended: set[str] = set()
        self._failed: set[str] = set()

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take host memory for the slots.

        Raises:
            ValueError: A second engine of the process: vLLM keeps one connector.
        """
        if self.copier is not None:
            raise ValueError(
                "engines with SinkHostCache must be at most 1 in a process, got a "
                "second one; shut the first down, or give it a process of its own"
            )
        regions = find_regions(self.config, kv_caches)
        total = sum(region.shape[1] for region in regions)
        assert total == slot_bytes(self.config), (total, slot_bytes(self.config))
        is_cuda = regions[0].device.type == "cuda"
        self.copier = (CudaCopier if is_cuda else Copier)(regions, self.num_slots)

    def load(self, copies: Copies) -> None:
        """Start the step's loads."""
        assert self.copier is not None
        for name, wanted in copies.loads.items():
            try:
                for slot, serial, _ in wanted:
                    if serial != self._serials[slot]:
                        raise ValueError(f"slot {slot} does not hold copy {serial}")
                self.copier.load(
                    name, [slot for slot, _, _ in wanted], [b for _, _, b in wanted]
                )
            except Exception as error:
                logger.warning(
                    "A chat could not be read from host memory and is computed "
                    "anew: %s",
                    error,
                )
                self._failed.add(name)
                self._ended.add(name)

    def save(self, copies: Copies) -> None:
        """Copy to the host what the step has computed."""
        assert self.copier is not None
        if not copies.saves:
            return
        blocks, slots, serials = zip(*copies.saves, strict=True)
        for slot in slots:
            self._serials[slot] = 0
        try:
            self.copier.save(blocks, slots)
        except Exception as error:
            logger.warning("A chat was not copied to host memory: %s", error)
            return
        for slot, serial in zip(slots, serials, strict=True):
            self._serials[slot] = serial

    def take_ended(self) -> tuple[set[str], set[str]]:
        """Requests whose loads have ended, and those among them that failed."""
        assert self.copier is not None
        ended = self._ended | self.copier.take_loaded()
        failed, self._ended, self._failed = self._failed, set(), set()
        return ended, failed


class Copier:
    """Copies at once, by torch: on a CPU.

    Args:
        regions: As of :func:`find_regions`.
        num_slots: Slots of the mirror.
    """

    def __init__(self, regions: list[torch.Tensor], num_slots: int) -> None:
        self.regions = regions
        self.mirrors = [
            torch.empty((num_slots, region.shape[1]), dtype=torch.int8)
            for region in regions
        ]
        self._loaded: set[str] = set()

    def load(self, name: str, slots: Sequence[int], blocks: Sequence[int]) -> None:
        for region, mirror in zip(self.regions, self.mirrors, strict=True):
            region[list(blocks)] = mirror[list(slots)]
        self._loaded.add(name)

    def save(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        for region, mirror in zip(self.regions, self.mirrors, strict=True):
            mirror[list(slots)] = region[list(blocks)]

    def take_loaded(self) -> set[str]:
        """Requests whose loads have ended since the last call."""
        loaded, self._loaded = self._loaded, set()
        return loaded


class CudaCopier(Copier):
    """Copies on a stream of its own, between pinned memory and the device.

    A save follows the step's kernels, and the next step's follow it: the blocks may be
    given to others at once. A load follows all that was there before it, and its
    request is scheduled only when its event has passed. vLLM's own batched copies do
    the work (``cuMemcpyBatchAsync``, for which the default stream will not do).
    """

    def __init__(self, regions: list[torch.Tensor], num_slots: int) -> None:
        from vllm.v1.simple_kv_offload import cuda_mem_ops

        super().__init__(regions, num_slots)
        self._copy = cuda_mem_ops.copy_blocks
        for mirror in self.mirrors:
            cuda_mem_ops.pin_tensor(mirror)
        self._stream = torch.cuda.Stream(device=regions[0].device)
        names = [str(index) for index in range(len(regions))]
        pool = dict(zip(names, self.regions, strict=True))
        host = dict(zip(names, self.mirrors, strict=True))
        # In the stream's order: a slot may be read right after it was filled.
        order = cuda_mem_ops.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        self._loads = cuda_mem_ops.build_params(host, pool, self._stream, order)
        self._saves = cuda_mem_ops.build_params(pool, host, self._stream, order)
        self._under_way: list[tuple[torch.cuda.Event, str]] = []

    def load(self, name: str, slots: Sequence[int], blocks: Sequence[int]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        self._copy(list(slots), list(blocks), self._loads)
        self._under_way.append((self._stream.record_event(), name))

    def save(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        self._copy(list(blocks), list(slots), self._saves)
        torch.cuda.current_stream().wait_stream(self._stream)

    def take_loaded(self) -> set[str]:
        ended = [(event, name) for event, name in self._under_way if event.query()]
        self._under_way = [each for each in self._under_way if each not in ended]
        return {name for _, name in ended}
