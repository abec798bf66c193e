"""Long time slices for threads that compute: whoever else wakes up runs at once.

Linux's scheduler runs the thread whose deadline is next, a slice from when it could last run. With
the usual few ms a client on the same machine, or the gateway, waits for the end of a computing
thread's slice; long slices put the deadline of that thread off, and take nothing from its share of
the processor (EEVDF; a thread has a slice of its own since Linux 6.12, see sched_setattr(2)).
"""

from __future__ import annotations

import ctypes
import platform
import sys

SLICE_SECONDS = 0.1
"""The longest that there is."""

_GET_AND_SET = {"x86_64": (315, 314), "aarch64": (275, 274), "riscv64": (275, 274)}


class _SchedAttr(ctypes.Structure):
    """struct sched_attr of linux/sched/types.h, in its first version."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


def _read() -> _SchedAttr | None:
    numbers = _GET_AND_SET.get(platform.machine())
    if sys.platform != "linux" or numbers is None:
        return None
    attr = _SchedAttr()
    failed = ctypes.CDLL(None).syscall(numbers[0], 0, ctypes.byref(attr), ctypes.sizeof(attr), 0)
    return None if failed else attr


def time_slice() -> float:
    """Of the calling thread, in seconds; 0 where the system does not tell."""
    attr = _read()
    return 0.0 if attr is None else float(attr.runtime) / 1e9


def lengthen_time_slice(seconds: float = SLICE_SECONDS) -> None:
    """For the calling thread and those that it starts, where the system lets threads choose."""
    attr = _read()
    if attr is not None:
        attr.runtime = int(seconds * 1e9)
        ctypes.CDLL(None).syscall(_GET_AND_SET[platform.machine()][1], 0, ctypes.byref(attr), 0)
