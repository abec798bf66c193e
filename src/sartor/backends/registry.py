"""Finds backends, Sartor's own and those of other packages, through their entry points."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sartor.backends.base import Backend, Device
from sartor.backends.plugins import entry_points_of
from sartor.errors import SartorError, UsageError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "sartor.backends"
BUILT_IN = {
    "cpu": "sartor.backends.cpu.backend:CpuBackend",
    "torch": "sartor.backends.torch.backend:TorchBackend",
    "reference": "sartor.backends.reference.backend:ReferenceBackend",
    "null": "sartor.backends.null.backend:NullBackend",
}
PREFERENCE = (("torch", "cuda"), ("cpu", ""), ("torch", ""), ("reference", ""))
"""Order of automatic choice: a backend, and how the names of those of its devices begin that
count. One that shows no such device, or that needs a package that is not there, is passed over."""

FOR_TESTS = frozenset({"reference", "null"})
"""Backends that define or imitate what others do; nobody runs a model on them to use it."""

_DRIVERS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg")
"""Signs of an NVIDIA driver: Linux, its containers, and Linux inside Windows."""


class MissingCoreError(SartorError):
    """The CPU backend's compiled part, which every installation has, cannot be imported."""


@cache
def _others() -> dict[str, EntryPoint]:
    """Backends of other packages; they cannot take the place of a built-in one."""
    return {e.name: e for e in entry_points_of(GROUP) if e.name not in BUILT_IN}


def backend_names() -> list[str]:
    """Names that :func:`load_backend` knows."""
    return sorted({*BUILT_IN, *_others()})


@cache
def load_backend(name: str) -> Backend:
    """One backend by name; UsageError lists the names, SartorError says why it cannot load."""
    if name not in BUILT_IN and name not in _others():
        raise UsageError(f"backend {name!r} is unknown; known are {', '.join(backend_names())}")
    try:
        backend: Backend = _factory(name)()
    except ImportError as error:
        if name == "cpu":
            raise MissingCoreError(
                f"the native core of Sartor cannot be loaded ({error}); it is missing, or was "
                "built for another Python or system: install Sartor again in this environment"
            ) from error
        raise SartorError(
            f"backend {name!r} cannot be loaded ({error}); install what it needs, or choose "
            f"another of {', '.join(backend_names())}"
        ) from error
    return backend


def _factory(name: str) -> Callable[[], Backend]:
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        found: Callable[[], Backend] = getattr(import_module(module), attribute)
    else:
        found = _others()[name].load()
    return found


def choose(backend: str = "auto", device: str = "auto") -> tuple[Backend, Device]:
    """The backend and device of a plan; "auto" takes the first that has a device."""
    reasons: list[str] = []
    missing_core = ""
    for name, prefix in PREFERENCE if backend == "auto" else ((backend, ""),):
        if prefix == "cuda" and not _may_have_cuda():
            continue
        try:
            candidate = load_backend(name)
        except UsageError:
            raise
        except SartorError as error:
            reasons.append(str(error))
            if isinstance(error, MissingCoreError):
                missing_core = str(error)
            continue
        found = candidate.devices()
        for place in found:
            if place.name == device or (device == "auto" and place.name.startswith(prefix)):
                if missing_core:
                    import logging

                    message = "%s; backend %s runs in its place, slowly"
                    logging.getLogger("sartor").warning(message, missing_core, name)
                return candidate, place
        names = ", ".join(place.name for place in found) or "none"
        reasons.append(f"backend {name!r} has no device {device!r} here (it has: {names})")
    raise SartorError("no backend can run: " + "; ".join(dict.fromkeys(reasons)))


def _may_have_cuda() -> bool:
    """Whether importing torch, which takes seconds, is worth it to look for a CUDA device."""
    if sys.platform == "win32":
        from ctypes.util import find_library

        driver = find_library("nvcuda") is not None
    else:
        driver = any(Path(path).exists() for path in _DRIVERS)
    return driver and find_spec("torch") is not None
