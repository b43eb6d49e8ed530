"""A worker's copies between its KV cache and host memory, on plain tensors."""

import pytest
import torch
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor

from vllm_sink.cache.host.scheduler import Copies
from vllm_sink.cache.host.worker import HostWorker, find_regions, slot_bytes

BLOCKS, PAGE = 5, 8  # bytes of a block in one layer
LAYERS = ["a", "b", "c"]


def make(layout: str) -> tuple[KVCacheConfig, dict[str, torch.Tensor], torch.Tensor]:
    """vLLM's configuration, a layer's view of the cache, and all its bytes.

    A second group of layers overlays the first, as vLLM's groups do.
    """
    size = BLOCKS * PAGE * len(LAYERS)
    strides = {
        "layer by layer": dict(layer_stride=PAGE * BLOCKS, block_stride=PAGE),
        "block by block": dict(layer_stride=PAGE, block_stride=PAGE * len(LAYERS)),
    }
    tensors = [
        KVCacheTensor(size=size, layers=layers, **strides[layout])
        for layers in (LAYERS, ["d", "e"])
    ]
    data = torch.arange(size, dtype=torch.int32).to(torch.int8)
    caches = {name: data.view(torch.float16)[:4] for name in [*LAYERS, "d"]}
    config = KVCacheConfig(BLOCKS, tensors, kv_cache_groups=[])
    return config, caches, data


def block_bytes(data: torch.Tensor, layout: str, block: int) -> torch.Tensor:
    shape = (len(LAYERS), BLOCKS, PAGE)
    if layout == "block by block":
        return data.view(BLOCKS, len(LAYERS) * PAGE)[block].clone()
    return data.view(shape)[:, block].clone()


@pytest.fixture(params=["layer by layer", "block by block"])
def layout(request):
    return request.param


def test_regions_hold_each_byte_once(layout):
    config, caches, data = make(layout)
    regions = find_regions(config, caches)
    assert sum(region.shape[1] for region in regions) == slot_bytes(config)
    for region in regions:
        region.fill_(7)
    assert bool((data == 7).all())


def test_a_block_goes_to_the_host_and_comes_back_elsewhere(layout):
    config, caches, data = make(layout)
    worker = HostWorker(config, 3)
    worker.register(caches)
    want = [block_bytes(data, layout, block) for block in (4, 1)]
    worker.save(Copies(saves=[(4, 0, 11), (1, 2, 12)]))
    data.fill_(-1)
    worker.load(Copies(loads={"r": [(2, 12, 3), (0, 11, 0)]}))
    assert worker.take_ended() == ({"r"}, set())
    assert worker.take_ended() == (set(), set())
    assert torch.equal(block_bytes(data, layout, 0), want[0])
    assert torch.equal(block_bytes(data, layout, 3), want[1])
    assert bool((block_bytes(data, layout, 2) == -1).all())


@pytest.mark.parametrize("wanted", [(1, 11, 3), (0, 10, 3), (-1, -1, 0)])
def test_a_slot_without_the_copy_fails_the_load(layout, wanted):
    config, caches, data = make(layout)
    worker = HostWorker(config, 3)
    worker.register(caches)
    worker.save(Copies(saves=[(4, 0, 11)]))
    before = data.clone()
    worker.load(Copies(loads={"r": [(0, 11, 2), wanted]}))
    assert worker.take_ended() == ({"r"}, {"r"})
    assert torch.equal(data, before)


def test_a_copy_to_the_host_that_fails_leaves_slots_that_hold_nothing(monkeypatch):
    config, caches, _ = make("layer by layer")
    worker = HostWorker(config, 3)
    worker.register(caches)
    worker.save(Copies(saves=[(4, 0, 11)]))

    def fail(blocks, slots):
        raise RuntimeError("no such memory")

    monkeypatch.setattr(worker.copier, "save", fail)
    worker.save(Copies(saves=[(3, 0, 12)]))
    worker.load(Copies(loads={"old": [(0, 11, 2)], "new": [(0, 12, 2)]}))
    assert worker.take_ended()[1] == {"old", "new"}


def test_one_engine_a_process():
    config, caches, _ = make("layer by layer")
    worker = HostWorker(config, 3)
    worker.register(caches)
    with pytest.raises(ValueError, match="at most 1 in a process, got a second"):
        worker.register(caches)
