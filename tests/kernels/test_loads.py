"""K/V loads are counted in the interpreter: S + W bounds them, whatever the length."""

import pytest
import torch
from triton.runtime import interpreter
from vllm_sink_kernels.triton.launch_config import LaunchConfig

from tests.kernels.batches import make_batch

TILE = 16
CONFIG = LaunchConfig(block_m=16, block_n=TILE, num_warps=1, num_stages=1)


@pytest.fixture
def loaded(monkeypatch):
    """Addresses that unmasked lanes of loads asked for, in order."""
    addresses: list = []
    real = interpreter._interpreter.load

    class Counting:
        def __getattr__(self, name):
            return getattr(interpreter_module, name)

        @staticmethod
        def load(pointers, mask, *rest):
            addresses.append(pointers[mask.astype(bool)].ravel())
            return real(pointers, mask, *rest)

    interpreter_module = interpreter._interpreter
    monkeypatch.setattr(interpreter, "_interpreter", Counting())
    return addresses


def count(addresses, tensor) -> int:
    start = tensor.untyped_storage().data_ptr()
    end = start + tensor.untyped_storage().nbytes()
    return sum(int(((a >= start) & (a < end)).sum()) for a in addresses)


@pytest.mark.parametrize("sinks,window", [(4, 60), (20, 300), (0, 64)])
@pytest.mark.parametrize("kernel", ["decode", "prefill"])
def test_loads_do_not_grow_with_the_sequence(loaded, kernel, sinks, window):
    d, kv_heads = 64, 2
    counts = []
    for n in (1_000, 99_944, 1_000_040):  # alike within a block of 128
        batch = make_batch(
            heads=(4, kv_heads),
            head_size=d,
            sinks=sinks,
            window=window,
            block_size=128,
            seq_lens=[1_000],
            query_lens=[1],
            turn=False,
        )
        # The same blocks, far away: a table of a million tokens, stale in the gap.
        table = torch.full((1, n // 128 + 2), 2**31 - 1, dtype=torch.int32)
        rows = [(k, k) for k in range(sinks)]
        rows += [(1_000 - 1 - i, n - 1 - i) for i in range(window)]
        k_cache = torch.full((12, 128, kv_heads, d), torch.nan)
        v_cache = torch.full_like(k_cache, torch.nan)
        blocks = sorted({far // 128 for _, far in rows})
        for new, block in enumerate(blocks):
            table[0, block] = new + 1
        for near, far in rows:
            old = batch.block_table[0, near // 128], near % 128
            new_at = table[0, far // 128], far % 128
            k_cache[new_at] = batch.k_cache[old]
            v_cache[new_at] = batch.v_cache[old]
        batch.k_cache, batch.v_cache, batch.block_table = k_cache, v_cache, table
        batch.seq_lens = [n]
        loaded.clear()
        out = getattr(batch, kernel)(CONFIG)
        assert not out.isnan().any()
        rounded = -(-sinks // TILE) * TILE + -(-window // TILE) * TILE
        for cache in (k_cache, v_cache):
            elements = count(loaded, cache)
            assert 0 < elements <= rounded * d * kv_heads
        # Exact here, in fact: what no row sees is masked off.
        assert count(loaded, k_cache) == (sinks + window) * d * kv_heads
        counts.append(sum(map(len, loaded)))
    assert max(counts) == min(counts), "something else grows with the sequence"
