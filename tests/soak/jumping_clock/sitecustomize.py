"""Python's wall clock, moved by the seconds in a file; put this folder on PYTHONPATH.

Every Python process started there has it, an engine core as well. ``time.monotonic``
and what C code reads stay as they are: a clock that is set is ``CLOCK_REALTIME``.
"""

import mmap
import os
import struct
import time

_OFFSET = struct.Struct("d")


def _jump(file: str) -> None:
    with open(file, "rb") as source:
        offset = mmap.mmap(source.fileno(), _OFFSET.size, access=mmap.ACCESS_READ)
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + _OFFSET.unpack(offset[:])[0]
    time.time_ns = lambda: real_ns() + int(1e9 * _OFFSET.unpack(offset[:])[0])


if "SOAK_CLOCK" in os.environ:
    _jump(os.environ["SOAK_CLOCK"])
