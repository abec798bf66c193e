"""Row kernels of other packages in the place of Sartor's own, through the public C interface.

``native/include/sartor/kernel.h`` describes the call. A package registers its kernels with
:func:`override_kernel`, by itself or from an entry point of the group ``sartor.cpu_kernels``: a
function without arguments that is called before the first program is compiled.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.backends.plugins import entry_points_of
from sartor.errors import SartorError, UsageError

GROUP = "sartor.cpu_kernels"
OVERRIDABLE = (
    "rms_norm",
    "layer_norm",
    "l2_norm",
    "add_rms_norm",
    "activation",
    "gated_activation",
    "add",
    "mul",
    "scale",
    "softcap",
)
"""Operators that treat every row by itself, as the interface asks."""


@dataclass(frozen=True)
class CustomKernel:
    """A function of the public interface; ``name`` is what :meth:`kernel_path` shows."""

    name: str
    address: int
    context: int = 0


_kernels: dict[str, CustomKernel] = {}
_lock = threading.RLock()
_loaded = False


def override_kernel(op: str, name: str, function: Any, context: int = 0) -> None:
    """Runs ``function`` for every ``op`` of programs that are compiled from now on.

    ``function`` is an address, or a ctypes function, which the caller keeps alive; ``context`` is
    an address that every call gets. UsageError for an operator that cannot be overridden.
    """
    if op not in OVERRIDABLE:
        raise UsageError(
            f"operator {op!r} cannot be overridden; those that can are {', '.join(OVERRIDABLE)}"
        )
    address = function if isinstance(function, int) else _address(function)
    if not address:
        raise UsageError(f"the kernel {name!r} for {op} is a null pointer")
    with _lock:
        _kernels[op] = CustomKernel(name, address, context)


def restore_kernel(op: str) -> None:
    """Sartor's own kernel again, for programs that are compiled from now on."""
    with _lock:
        _kernels.pop(op, None)


def custom_kernels() -> dict[str, CustomKernel]:
    """The overriding kernels by operator, those of installed packages included."""
    global _loaded
    with _lock:
        if not _loaded:
            _loaded = True  # also where a package fails: once is enough to say so
            for entry in entry_points_of(GROUP):
                try:
                    entry.load()()
                except SartorError:
                    raise
                except Exception as error:
                    raise SartorError(
                        f"the CPU kernels of {entry.value} cannot be loaded "
                        f"({type(error).__name__}: {error}); mend or remove the package"
                    ) from error
        return dict(_kernels)


def fused_operators(wanted: frozenset[str], custom: Mapping[str, CustomKernel]) -> frozenset[str]:
    """The fused forms that hide no overridden operator: ``add_rms_norm`` would bypass both."""
    hidden = {"add", "rms_norm"} & custom.keys()
    return wanted - {"add_rms_norm"} if hidden and "add_rms_norm" not in custom else wanted


def include_dir() -> Path:
    """The folder that a C compiler needs for ``#include "sartor/kernel.h"``."""
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "include", package / "native" / "include"):
        if (folder / "sartor" / "kernel.h").exists():
            return folder
    raise SartorError(f"{package}: sartor/kernel.h is missing; install Sartor again")


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0
