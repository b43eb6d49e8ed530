"""Steps as vLLM hands them to a builder, around the batches of the kernel tests."""

from types import SimpleNamespace

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from tests.helpers.refusals import Config, drafter, stub_config
from tests.kernels.batches import NAN, STALE_ID, Batch, make_batch
from vllm_sink.attention import base
from vllm_sink.attention.gpu import SinkGpuImpl
from vllm_sink.attention.gpu_plan import SinkGpuMetadataBuilder
from vllm_sink.cache.spec import SinkSpec
from vllm_sink.policy.config import SinkConfig
from vllm_sink.rotation.table import RotaryTable

SINKS, WINDOW = 4, 28
MAX_LEN = 256


def make_impl(batch: Batch, **kw) -> SinkGpuImpl:
    _, num_heads, head_size = batch.q.shape
    return SinkGpuImpl(
        num_heads, head_size, batch.kw["scale"], batch.k_cache.shape[2], **kw
    )


def make_builder(
    monkeypatch,
    impl,
    *,
    block_size=16,
    cos_sin_cache=None,
    sliding_window=None,
    device="cpu",
    num_speculative_tokens=None,
    max_num_seqs=8,
) -> SinkGpuMetadataBuilder:
    """A builder for one layer that ``impl`` serves."""
    layer = SimpleNamespace(impl=impl, sliding_window=sliding_window)
    monkeypatch.setattr(
        base,
        "get_layers_from_vllm_config",
        lambda _, kind, names: {"layer": layer} if kind is Attention else {},
    )
    rotation = None if cos_sin_cache is None else RotaryTable(cos_sin_cache, True)
    monkeypatch.setattr(base, "find_rotation", lambda *_: rotation)
    monkeypatch.setattr(base, "measured_rotation", lambda *_: None)
    speculative = num_speculative_tokens and drafter(
        "ngram", num_speculative_tokens=num_speculative_tokens, parallel_drafting=False
    )
    section = {
        "num_sink_tokens": SINKS,
        "window_size": WINDOW,
        "sink_positions": "absolute" if rotation is None else "cache",
    }
    config = stub_config(
        additional_config={"sink": section},
        model_config__max_model_len=MAX_LEN,
        scheduler_config__max_num_batched_tokens=64,
        scheduler_config__max_num_seqs=max_num_seqs,
        cache_config__block_size=block_size,
        compilation_config=Config(max_cudagraph_capture_size=64),
        speculative_config=speculative,
    )
    shape = {
        "block_size": block_size,
        "num_kv_heads": impl.num_kv_heads,
        "head_size": impl.head_size,
        "dtype": torch.float32,
    }
    if sliding_window is None:
        full = FullAttentionSpec(**shape)
        spec = SinkSpec.from_full(full, SinkConfig(**section))
    else:
        spec = SlidingWindowSpec(**shape, sliding_window=sliding_window)
    return SinkGpuMetadataBuilder(spec, ["layer"], config, torch.device(device))


class Step:
    """One step in buffers of fixed size, padded like a CUDA graph's batch.

    Padding: tokens of NaN with slot -1, requests without a token whose lengths and
    block tables are stale.
    """

    def __init__(self, num_tokens: int, num_reqs: int, max_blocks: int) -> None:
        self.num_tokens, self.num_reqs = num_tokens, num_reqs
        self.start_loc = torch.zeros(num_reqs + 1, dtype=torch.int32)
        self.seq_lens = torch.zeros(num_reqs, dtype=torch.int32)
        self.block_table = torch.zeros(num_reqs, max_blocks, dtype=torch.int32)
        self.slots = torch.full((num_tokens,), -1, dtype=torch.int64)
        self.max_query_len = 0

    @classmethod
    def of(cls, batch: Batch, pad_tokens: int = 0, pad_reqs: int = 0) -> "Step":
        step = cls(
            len(batch.q) + pad_tokens,
            len(batch.seq_lens) + pad_reqs,
            batch.block_table.shape[1],
        )
        step.fill(batch)
        return step

    def fill_dummy(self, max_query_len: int) -> None:
        """What vLLM captures a graph with: spread tokens, the null block, no slot."""
        ends = torch.arange(1, self.num_reqs + 1) * self.num_tokens // self.num_reqs
        self.start_loc[1:] = ends
        self.seq_lens[:] = max_query_len
        self.block_table.zero_()
        self.slots.fill_(-1)
        self.max_query_len = max_query_len

    def fill(self, batch: Batch) -> None:
        n = len(batch.seq_lens)
        self.start_loc[: n + 1] = batch.query_start_loc
        self.start_loc[n + 1 :] = len(batch.q)
        self.seq_lens[:n] = torch.tensor(batch.seq_lens)
        self.seq_lens[n:] = 77
        self.block_table.fill_(STALE_ID)
        self.block_table[:n] = batch.block_table
        self.slots.fill_(-1)
        self.slots[: len(batch.q)] = slots_of(batch)
        self.max_query_len = max(batch.query_lens)

    def common(self, device: str = "cpu") -> CommonAttentionMetadata:
        return CommonAttentionMetadata(
            query_start_loc=self.start_loc.to(device),
            query_start_loc_cpu=self.start_loc.clone(),
            seq_lens=self.seq_lens.to(device),
            num_reqs=self.num_reqs,
            num_actual_tokens=self.num_tokens,
            max_query_len=self.max_query_len,
            max_seq_len=MAX_LEN,
            block_table_tensor=self.block_table.to(device),
            slot_mapping=self.slots.to(device),
        )


def slots_of(batch: Batch) -> torch.Tensor:
    """[T] int64: where the step's tokens lie in the cache."""
    positions, size = batch.positions().long(), batch.k_cache.shape[1]
    blocks = batch.block_table[batch.requests().long(), positions // size].long()
    return blocks * size + positions % size


def padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    """``x`` [T, ...] followed by rows of NaN."""
    spare = torch.full((rows - len(x), *x.shape[1:]), NAN, dtype=x.dtype)
    return torch.cat([x, spare])


class LayerInputs:
    """query, key, value and cache of a layer before the step wrote anything."""

    def __init__(self, batch: Batch, num_tokens: int, scale: float = 1.0) -> None:
        k_cache, v_cache = batch.k_cache.clone(), batch.v_cache.clone()
        slots, size = slots_of(batch), k_cache.shape[1]
        where = slots // size, slots % size
        self.query = padded(batch.q, num_tokens)
        self.key = padded(self.real(batch, k_cache[where], scale), num_tokens)
        self.value = padded(self.real(batch, v_cache[where], scale), num_tokens)
        self.expected_cache = self.join(k_cache, v_cache)
        for cache in (k_cache, v_cache):
            cache[where] = torch.tensor(NAN).to(cache.dtype)
        self.cache = self.join(k_cache, v_cache)
        self.output = torch.full_like(self.query, NAN)

    @staticmethod
    def real(batch: Batch, x: torch.Tensor, scale: float) -> torch.Tensor:
        """What the layer computed before it was put into the cache."""
        return (x.float() * scale).to(batch.q.dtype)

    @staticmethod
    def join(k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        """[B, HKV, N, 2D] as vLLM's layers see it."""
        return torch.cat([k_cache, v_cache], dim=-1).transpose(1, 2)

    def assert_cache_is_exact(self) -> None:
        """Every byte, NaN included."""
        got, want = (
            x.contiguous().view(torch.uint8) for x in (self.cache, self.expected_cache)
        )
        assert torch.equal(got, want)


__all__ = [
    "MAX_LEN",
    "SINKS",
    "WINDOW",
    "LayerInputs",
    "Step",
    "make_batch",
    "make_builder",
    "make_impl",
]
