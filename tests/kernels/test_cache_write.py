"""Cache writes against plain indexing.

Rounding to fp8 is the hardware's and is checked on a GPU: the interpreter rounds
ties up and loses the carry into the exponent. Here values are exact in e4m3.
"""

import pytest
import torch
from vllm_sink_kernels.triton.cache_write import write_kv_cache


def views(layout, num_blocks, block_size, heads, d, dtype):
    if layout == "packed":  # [B, H, N, 2 * D]
        both = torch.zeros(num_blocks, heads, block_size, 2 * d).to(dtype)
        return [x.transpose(1, 2) for x in both.split(d, dim=3)]
    if layout == "HND":
        shape = (num_blocks, heads, block_size, d)
        return [torch.zeros(shape).to(dtype).transpose(1, 2) for _ in "kv"]
    return [torch.zeros(num_blocks, block_size, heads, d).to(dtype) for _ in "kv"]


@pytest.mark.parametrize("layout", ["NHD", "HND", "packed"])
@pytest.mark.parametrize(
    "dtype,fp8,scales",
    [
        (torch.float32, False, None),
        (torch.float16, False, None),
        (torch.bfloat16, False, None),
        (torch.float32, True, None),
        (torch.float32, True, "float"),
        (torch.float16, True, "tensor"),
    ],
)
@pytest.mark.parametrize(
    "heads,d,block_size", [(3, 80, 16), (1, 64, 48), (34, 128, 16)]
)
def test_matches_indexing(layout, dtype, fp8, scales, heads, d, block_size):
    n = 5
    cache_dtype = torch.float8_e4m3fn if fp8 else dtype
    k_cache, v_cache = views(layout, 4, block_size, heads, d, cache_dtype)
    want_k, want_v = k_cache.clone(), v_cache.clone()
    ks, vs = (0.5, 4.0) if scales else (1.0, 1.0)
    values = torch.randint(-15, 16, (2, n, heads, 2 * d)) / 4  # exact in e4m3
    k, v = (x[..., :d] for x in values.to(dtype))  # strided rows
    slots = torch.tensor(
        [0, -1, 3 * block_size + 7, block_size - 1, 4 * block_size - 1]
    )
    given = {None: (None, None), "float": (ks, vs)}.get(
        scales, (torch.tensor([ks]), torch.tensor(vs))
    )
    write_kv_cache(k, v, k_cache, v_cache, slots, *given)
    for i, slot in enumerate(slots.tolist()):
        if slot >= 0:
            at = slot // block_size, slot % block_size
            want_k[at] = (k[i].float() / ks).to(cache_dtype)
            want_v[at] = (v[i].float() / vs).to(cache_dtype)
    assert torch.equal(k_cache.float(), want_k.float())
    assert torch.equal(v_cache.float(), want_v.float())


def test_fp8_saturates():
    k_cache, v_cache = views("NHD", 1, 16, 1, 64, torch.float8_e4m3fn)
    k = torch.full((1, 1, 64), 1e5)
    write_kv_cache(k, -k, k_cache, v_cache, torch.tensor([0]))
    assert (k_cache[0, 0].float() == 448).all()
    assert (v_cache[0, 0].float() == -448).all()


def test_padding_rows_of_k_are_not_written():
    k_cache, v_cache = views("NHD", 2, 16, 2, 64, torch.float32)
    k = torch.full((4, 2, 64), torch.nan)
    k[:2] = 1
    write_kv_cache(k, k, k_cache, v_cache, torch.tensor([20, -1]))
    assert (k_cache[1, 4] == 1).all() and k_cache.sum() == 2 * 64
    write_kv_cache(k, k, k_cache, v_cache, torch.empty(0, dtype=torch.int64))


def test_slots_beyond_two_to_the_31_elements():
    stride = 2**31 + 64
    caches = [
        torch.empty(stride + 16 * 64, dtype=torch.float16).as_strided(
            (2, 16, 1, 64), (stride, 64, 64, 1)
        )
        for _ in "kv"
    ]
    k = torch.randn(1, 1, 64).half()
    write_kv_cache(k, 2 * k, *caches, torch.tensor([16 + 3]))
    assert torch.equal(caches[0][1, 3], k[0])
    assert torch.equal(caches[1][1, 3], 2 * k[0])
