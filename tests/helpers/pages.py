"""Pages as the CPU's loops keep them, made by another hand than the loops'."""

import torch


def stored(pages: torch.Tensor) -> torch.Tensor:
    """Pages [B, HKV, 2N, D], N keys then N values, in the layout of ``cpu.micro``."""
    *_, twice, dim = pages.shape
    keys, values = pages.split(twice // 2, dim=2)
    keys = keys.transpose(2, 3)  # [B, HKV, D, N]
    if pages.dtype == torch.bfloat16:
        keys = keys.unflatten(2, (dim // 2, 2)).transpose(3, 4)  # [.., D/2, N, 2]
    return torch.cat([keys.flatten(2), values.flatten(2)], dim=2).view_as(pages)


def loaded(pages: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`stored`."""
    blocks, heads, twice, dim = pages.shape
    size = twice // 2
    keys, values = pages.flatten(2).split(size * dim, dim=2)
    if pages.dtype == torch.bfloat16:
        keys = keys.reshape(blocks, heads, dim // 2, size, 2).transpose(3, 4)
    keys = keys.reshape(blocks, heads, dim, size).transpose(2, 3)
    return torch.cat([keys, values.reshape(blocks, heads, size, dim)], dim=2)
