"""Finds backends, Sartor's own and those of other packages, through their entry points."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from sartor.backends.base import Backend, Device
from sartor.errors import SartorError, UsageError

GROUP = "sartor.backends"
BUILT_IN = {
    "cpu": "sartor.backends.cpu.backend:CpuBackend",
    "reference": "sartor.backends.reference.backend:ReferenceBackend",
    "null": "sartor.backends.null.backend:NullBackend",
}
PREFERENCE = ("cpu", "reference")
"""Order of automatic choice; a backend that shows no device is passed over."""


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
    for name in PREFERENCE if backend == "auto" else (backend,):
        try:
            candidate = load_backend(name)
        except UsageError:
            raise
        except SartorError as error:
            reasons.append(str(error))
            continue
        for found in candidate.devices():
            if device in ("auto", found.name):
                return candidate, found
        reasons.append(f"backend {name!r} has no device {device!r} here")
    raise SartorError("no backend can run: " + "; ".join(reasons))
