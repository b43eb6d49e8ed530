"""The folder in which Numba keeps compiled loops, and a lock on it."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from numba.core.caching import CompileResultCacheImpl

ROOM_BYTES = 8 << 20  # the loops of one pair of dtypes take less than 1 MiB


def cache_folder() -> Path | None:
    """The folder that Numba chooses for this package, if it takes what it writes.

    Numba ends the compilation with an OSError where the disk is full and with a
    RuntimeError where no folder can be written. A warning here instead: loops that
    are compiled at each start serve as well.
    """
    try:
        folder = CompileResultCacheImpl(cache_folder).locator.get_cache_path()
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(ROOM_BYTES))
            file.flush()
    except (OSError, RuntimeError) as error:
        warnings.warn(
            "NUMBA_CACHE_DIR must be a folder with 8 MiB of room, got "
            f"{error}; set it to one, until then each start compiles the attention "
            "loops anew",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return Path(folder)


@contextlib.contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Alone with the folder: of processes that start together one compiles.

    The others then find its loops. Without a folder, or on a file system that locks
    nothing, all compile; the system gives the lock back if its holder dies.
    """
    with contextlib.ExitStack() as stack:
        if folder is not None:
            with contextlib.suppress(ImportError, OSError):
                import fcntl

                file = stack.enter_context(open(folder / "vllm_sink.lock", "a"))
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
