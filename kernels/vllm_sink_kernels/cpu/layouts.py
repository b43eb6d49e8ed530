"""How the numbers of a page stand: our own layout and those of vLLM's CPU kernels.

A page of a head is [2N, D] numbers, keys and then values. The loops read any of these;
they write :data:`OWN` alone.

Shape letters: D head size, N block size.
"""

from __future__ import annotations

import torch

from vllm_sink_kernels.cpu.native import LANES

# Keys [D, N], for bfloat16 [D/2, N, 2]; values [N, D]: see :mod:`micro`.
OWN = 0
# Keys [D, N] in every dtype, values [N, D]: vLLM's "vec" and "vec16".
PLAIN = 1
# bfloat16 in tiles that AMX loads: keys [N/16, D/2, 16, 2], values [D/16, N/2, 16, 2].
TILED = 2
TILE = 16


def arrange(keys: torch.Tensor, values: torch.Tensor, layout: int) -> torch.Tensor:
    """The page [2N, D] of keys and values [N, D], both of a token each row."""
    size, dim = keys.shape
    if layout == TILED:
        keys = keys.view(size // TILE, TILE, dim // 2, 2).transpose(1, 2)
        values = values.view(size // 2, 2, dim // TILE, TILE).permute(2, 0, 3, 1)
    elif layout == OWN and keys.dtype == torch.bfloat16:
        keys = keys.view(size, dim // 2, 2).transpose(0, 1)
    else:
        keys = keys.T
    return torch.cat([keys.flatten(), values.flatten()]).view(2 * size, dim)


def fits(layout: int, dtype: torch.dtype, block_size: int, head_size: int) -> bool:
    """Whether pages can be laid out so."""
    if layout != TILED:
        return True
    if LANES != TILE:
        return False
    sizes = block_size % (2 * TILE) == 0 and head_size % (2 * TILE) == 0
    return dtype == torch.bfloat16 and sizes
