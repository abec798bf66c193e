"""One step of a program: on the chip where it has a kernel, in numpy on the host where not."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
from sartor.backends.reference.step import Handler, Step
from sartor.graph import Batch, StepOutput

from sartor_example_chip.kernels import KERNELS

Array = npt.NDArray[Any]


class ExampleStep(Step):
    """The reference's pass over the nodes, with the chip's kernels in it.

    Results stay where they were made until somebody on the other side asks for them. A chip
    with memory of its own copies in ``chip`` and ``x``; this one changes the type.
    """

    def __init__(self, executable: Any, batch: Batch) -> None:
        super().__init__(executable, batch)
        self.executable = executable

    def handler(self, op: str) -> Handler:
        return KERNELS.get(op) or super().handler(op)

    def chip(self, value: int) -> npt.NDArray[np.float64]:
        """A value in the chip's memory: a weight as packed, or a result."""
        if value in self.results:
            return self.results[value].astype(np.float64, copy=False)
        return self.executable.buffers[value]

    def x(self, value: int) -> Array:
        """A value on the host: float32, or int32 ids."""
        return _host(super().x(value))

    def run(self) -> StepOutput:
        output = super().run()
        taps = {name: _host(result) for name, result in output.taps.items()}
        return dataclasses.replace(output, taps=taps, embeddings=_host(output.embeddings))


def _host(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype == np.float64 else array
