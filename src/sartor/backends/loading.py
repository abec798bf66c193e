"""Strict loading: every weight that a program declares, with exactly its shape."""

from __future__ import annotations

from collections.abc import Iterator

from sartor.backends.base import WeightSource
from sartor.errors import FormatError
from sartor.graph import Program
from sartor.ops.weights import Weight


def iterate_weights(program: Program, source: WeightSource) -> Iterator[tuple[str, Weight]]:
    """Weights one at a time, so that a packer holds no second copy of the model."""
    for spec in program.weights:
        weight = source.weight(spec.name)
        if weight.shape != spec.shape:
            raise FormatError(
                f"weight {spec.name}: the checkpoint has shape {list(weight.shape)}, the model "
                f"needs {list(spec.shape)}; the checkpoint does not match its configuration"
            )
        yield spec.name, weight


def load_weights(program: Program, source: WeightSource) -> dict[str, Weight]:
    return dict(iterate_weights(program, source))
