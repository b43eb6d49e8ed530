"""Pages as the CPU's loops keep them, written without the loops' own code."""

import torch
from vllm_sink_kernels.cpu import layouts


def stored(pages: torch.Tensor, layout: int = layouts.OWN) -> torch.Tensor:
    """Pages [B, HKV, 2N, D], N keys then N values, in a layout of ``cpu.layouts``."""
    *_, twice, dim = pages.shape
    if layout == layouts.TILED:
        return in_tiles(pages)
    keys, values = pages.split(twice // 2, dim=2)
    keys = keys.transpose(2, 3)  # [B, HKV, D, N]
    if pages.dtype == torch.bfloat16 and layout == layouts.OWN:
        keys = keys.unflatten(2, (dim // 2, 2)).transpose(3, 4)  # [.., D/2, N, 2]
    return torch.cat([keys.flatten(2), values.flatten(2)], dim=2).view_as(pages)


def in_tiles(pages: torch.Tensor) -> torch.Tensor:
    """Number by number: where AMX's tiles have a token's dim, in numbers of a page."""
    size, dim = pages.shape[2] // 2, pages.shape[3]
    t, d = torch.meshgrid(torch.arange(size), torch.arange(dim), indexing="ij")
    keys = t // 16 * 16 * dim + d // 2 * 32 + t % 16 * 2 + d % 2
    values = d // 16 * 16 * size + t // 2 * 32 + d % 16 * 2 + t % 2
    result = torch.empty_like(pages.flatten(2))
    result[:, :, torch.cat([keys, size * dim + values]).flatten()] = pages.flatten(2)
    return result.view_as(pages)


def loaded(pages: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`stored`."""
    blocks, heads, twice, dim = pages.shape
    size = twice // 2
    keys, values = pages.flatten(2).split(size * dim, dim=2)
    if pages.dtype == torch.bfloat16:
        keys = keys.reshape(blocks, heads, dim // 2, size, 2).transpose(3, 4)
    keys = keys.reshape(blocks, heads, dim, size).transpose(2, 3)
    return torch.cat([keys, values.reshape(blocks, heads, size, dim)], dim=2)
