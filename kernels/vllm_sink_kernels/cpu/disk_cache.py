"""Whether Numba can keep compiled loops on this machine's disk."""

from __future__ import annotations

import tempfile
import warnings

from numba.core.caching import CompileResultCacheImpl

ROOM_BYTES = 8 << 20  # the loops of one pair of dtypes take about 2 MiB


def has_room() -> bool:
    """Whether the folder that Numba chooses for this package takes what it writes.

    Numba ends the compilation with an OSError where the disk is full and with a
    RuntimeError where no folder can be written. A warning here instead: loops that
    are compiled at each start serve as well.
    """
    try:
        folder = CompileResultCacheImpl(has_room).locator.get_cache_path()
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(ROOM_BYTES))
            file.flush()
    except (OSError, RuntimeError) as error:
        warnings.warn(
            "NUMBA_CACHE_DIR must be a folder with 8 MiB of room, got "
            f"{error}; set it to one, until then each start takes half a minute to "
            "compile the attention loops",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
