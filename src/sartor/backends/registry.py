"""Finds backends, Sartor's own and those of other packages, through their entry points."""

from __future__ import annotations

import sys
from ctypes.util import find_library
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

from sartor.backends.base import Backend, Device
from sartor.errors import SartorError, UsageError

GROUP = "sartor.backends"
BUILT_IN = {
    "cpu": "sartor.backends.cpu.backend:CpuBackend",
    "torch": "sartor.backends.torch.backend:TorchBackend",
    "reference": "sartor.backends.reference.backend:ReferenceBackend",
    "null": "sartor.backends.null.backend:NullBackend",
}
PREFERENCE = (("torch", "cuda"), ("cpu", ""), ("torch", ""), ("reference", ""))
"""Order of automatic choice: a backend, and how the names of those of its devices begin that
count. One that cannot be loaded, or that shows no such device, is passed over."""

_DRIVERS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg")
"""Signs of an NVIDIA driver: Linux, its containers, and Linux inside Windows."""


@cache
def _entries() -> dict[str, EntryPoint]:
    built_in = {name: EntryPoint(name, target, GROUP) for name, target in BUILT_IN.items()}
    return built_in | {
        entry.name: entry for entry in entry_points(group=GROUP) if entry.name not in built_in
    }


def backend_names() -> list[str]:
    """Names that :func:`load_backend` knows."""
    return sorted(_entries())


@cache
def load_backend(name: str) -> Backend:
    """One backend by name; UsageError lists the names, SartorError says why it cannot load."""
    entry = _entries().get(name)
    if entry is None:
        raise UsageError(f"backend {name!r} is unknown; known are {', '.join(backend_names())}")
    try:
        backend: Backend = entry.load()()
    except ImportError as error:
        raise SartorError(
            f"backend {name!r} cannot be loaded ({error}); install what it needs, or choose "
            f"another of {', '.join(backend_names())}"
        ) from error
    return backend


def choose(backend: str = "auto", device: str = "auto") -> tuple[Backend, Device]:
    """The backend and device of a plan; "auto" takes the first that has a device."""
    reasons: list[str] = []
    for name, prefix in PREFERENCE if backend == "auto" else ((backend, ""),):
        if prefix == "cuda" and not _may_have_cuda():
            continue
        try:
            candidate = load_backend(name)
        except UsageError:
            raise
        except SartorError as error:
            reasons.append(str(error))
            continue
        found = candidate.devices()
        for place in found:
            if place.name == device or (device == "auto" and place.name.startswith(prefix)):
                return candidate, place
        names = ", ".join(place.name for place in found) or "none"
        reasons.append(f"backend {name!r} has no device {device!r} here (it has: {names})")
    raise SartorError("no backend can run: " + "; ".join(dict.fromkeys(reasons)))


def _may_have_cuda() -> bool:
    """Whether importing torch, which takes seconds, is worth it to look for a CUDA device."""
    if sys.platform == "win32":
        driver = find_library("nvcuda") is not None
    else:
        driver = any(Path(path).exists() for path in _DRIVERS)
    return driver and find_spec("torch") is not None
