"""What Sartor can do with packages that are not installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True)
class Extra:
    """An extra of the package ``sartor`` by ``name``; ``modules`` are what it installs."""

    name: str
    brings: str
    modules: tuple[str, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """Modules that are not here. Found by name: importing torch takes seconds."""
        return tuple(module for module in self.modules if not _installed(module))

    @property
    def command(self) -> str:
        return f"pip install 'sartor[{self.name}]'"


EXTRAS = (
    Extra("torch", "other chips: CUDA, ROCm, XPU and Apple GPUs, through torch", ("torch",)),
    Extra(
        "gpu",
        "torch with Triton, for kernels that are written in it",
        ("torch", "triton") if sys.platform == "linux" else ("torch",),
    ),
    Extra(
        "transformers",
        "models that Sartor has no file for, through transformers",
        ("torch", "transformers"),
    ),
    Extra(
        "otel",
        "spans of a server's requests for OpenTelemetry",
        ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"),
    ),
)


def missing_extras() -> Sequence[Extra]:
    """Those of which something is not installed."""
    return [extra for extra in EXTRAS if extra.missing]


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it
        return False
