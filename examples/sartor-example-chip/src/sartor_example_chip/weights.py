"""Packing: every weight goes where the operators that read it will look for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sartor.backends.base import WeightSource
from sartor.backends.loading import iterate_weights
from sartor.graph import Program
from sartor.ops import Weight

from sartor_example_chip.kernels import KERNELS

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ExampleWeights:
    """By name: ``chip`` in the layout of the chip's kernels (here plain float64), ``host`` in
    Sartor's canonical form, for operators that the chip has no kernel for."""

    chip: dict[str, F64]
    host: dict[str, Weight]

    @property
    def nbytes(self) -> int:
        host = [part for w in self.host.values() for part in (w.data, w.scale, w.offset)]
        arrays = [*self.chip.values(), *(part for part in host if part is not None)]
        return sum(array.nbytes for array in arrays)

    @property
    def bits_per_weight(self) -> float:
        counts = {name: array.size for name, array in self.chip.items()}
        counts |= {name: weight.data.size for name, weight in self.host.items()}
        return 8 * self.nbytes / sum(counts.values())


def pack(program: Program, source: WeightSource) -> ExampleWeights:
    """One weight at a time, so that there is no second copy of the model. FormatError where a
    shape is not the program's: ``iterate_weights`` checks."""
    readers: dict[int, set[str]] = {}
    for node in program.nodes:
        for value in node.inputs:
            readers.setdefault(value, set()).add(node.op)
    by_name = {spec.name: readers.get(spec.value, set()) for spec in program.weights}
    packed = ExampleWeights({}, {})
    for name, weight in iterate_weights(program, source):
        if by_name[name] & KERNELS.keys():
            packed.chip[name] = weight.dequantize().astype(np.float64)
        if by_name[name] - KERNELS.keys():
            packed.host[name] = weight
    return packed
