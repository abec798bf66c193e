"""A kernel of Sartor's own CPU backend, replaced through the public C interface.

An override counts for every program of a process, so this one waits to be asked for:
``SARTOR_EXAMPLE_KERNELS=1``.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from sartor.backends.cpu.custom import override_kernel
from sartor.errors import SartorError, UsageError

VARIABLE = "SARTOR_EXAMPLE_KERNELS"

_loaded: list[ctypes.CDLL] = []  # a library lives as long as its kernels can be called


def register() -> None:
    """Called by Sartor before the first program of the ``cpu`` backend is compiled."""
    wanted = os.environ.get(VARIABLE, "0")
    if wanted not in ("0", "1"):
        raise UsageError(f"{VARIABLE} is {wanted!r}; set it to 1 to use the kernel, or to 0")
    if wanted == "1":
        override_kernel("gated_activation", "example", library().example_gated_activation)


def library() -> ctypes.CDLL:
    """The shared library that was built with this package."""
    if not _loaded:
        folder = Path(__file__).parent
        built = [p for p in folder.glob("example_kernels.*") if p.suffix in (".so", ".dll")]
        if not built:
            raise SartorError(f"{folder}: no example_kernels library; install the package again")
        _loaded.append(ctypes.CDLL(str(built[0])))
    return _loaded[0]
