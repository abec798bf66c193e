"""Static steps as CUDA graphs: captured when a shape first comes, replayed from then on.

A captured step reads all its inputs from one buffer, so a replay is one copy, at most one small
launch for tokens in flight, and the graph. Capturing waits for the device; that happens once for
each shape, and shapes are powers of two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from sartor.backends.torch.layout import StepShape, Transfer
from sartor.backends.torch.sampling import SamplingShape

if TYPE_CHECKING:
    from sartor.backends.torch.executable import Outcome, TorchExecutable

Array = npt.NDArray[Any]
_WARM_UPS = 2  # libraries set themselves up in the first runs, which a capture does not allow


class _Captured:
    """One shape: its input buffer, its graph, and where the graph leaves its results."""

    def __init__(
        self,
        executable: TorchExecutable,
        shape: StepShape,
        sampling: SamplingShape | None,
        arrays: Mapping[str, Array],
        pool: Any,
    ) -> None:
        # Captured over padding alone: the runs before must not touch anybody's state.
        blank = Transfer(in_scratch(executable, arrays), executable.device)
        self.buffer = blank.start()
        self.views = blank.views(self.buffer)
        for _ in range(_WARM_UPS):
            executable.run(shape, self.views, sampling)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may work on the device meanwhile.
        with torch.cuda.graph(
            self.graph, pool=pool, stream=executable.stream, capture_error_mode="thread_local"
        ):
            self.outcome = executable.run(shape, self.views, sampling)


def in_scratch(executable: TorchExecutable, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """A step's arrays with all of its work moved to the scratch blocks, whoever's they were."""
    moved = {}
    for name, array in arrays.items():
        kind, _, rest = name.partition(".")
        if kind == "tokens":
            array = np.zeros_like(array)
        elif kind in ("slots", "blocks", "read", "write"):
            block = executable.state.scratch[int(rest.partition(".")[0])]
            first = block * executable.plan.block_size if kind == "slots" else block
            array = np.full_like(array, first)
        moved[name] = array
    return moved


class StepGraphs:
    """The captured steps of one executable; they share one pool of memory."""

    def __init__(self, executable: TorchExecutable) -> None:
        self._executable = executable
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[tuple[StepShape, SamplingShape | None], _Captured] = {}

    @property
    def nbytes(self) -> int:
        return sum(captured.buffer.nbytes for captured in self._captured.values())

    @property
    def count(self) -> int:
        """Shapes captured so far."""
        return len(self._captured)

    def run(
        self,
        shape: StepShape,
        sampling: SamplingShape | None,
        arrays: Mapping[str, Array],
        in_flight: bool,
    ) -> Outcome:
        """Replays the step of that shape over these arrays.

        The result without samples is valid until the next replay; samples are copies.
        """
        key = (shape, sampling)
        if key not in self._captured:
            self._captured[key] = _Captured(self._executable, shape, sampling, arrays, self._pool)
        captured = self._captured[key]
        Transfer(arrays, self._executable.device).start(captured.buffer)
        if in_flight:
            self._executable.resolve(captured.views["tokens"])
        captured.graph.replay()
        outcome = captured.outcome
        if outcome.sampled is None:
            return outcome
        tokens = outcome.sampled.tokens.clone()
        return dataclasses.replace(
            outcome, sampled=dataclasses.replace(outcome.sampled, tokens=tokens)
        )

    def clear(self) -> None:
        self._captured.clear()
        self._pool = torch.cuda.graph_pool_handle()
