"""One pass over a program: its values, and what operators may ask of the batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sartor.backends.torch.layout import SegmentShape, StepShape
from sartor.backends.torch.linear import prepare
from sartor.backends.torch.sampling import Sampled, SamplingShape
from sartor.backends.torch.weights import TorchWeight
from sartor.graph import Node
from sartor.ops.rope import attention_factor

if TYPE_CHECKING:
    from sartor.backends.torch.executable import TorchExecutable


@dataclass(frozen=True)
class Segment:
    """Sequences of like lengths, side by side.

    members   ``[s]`` their numbers in the batch
    rows      ``[s, queries]`` token rows; T where a sequence has fewer
    lengths   ``[s]`` new tokens, ``contexts [s]`` tokens that the state holds already
    """

    index: int
    shape: SegmentShape
    members: Tensor
    rows: Tensor
    lengths: Tensor
    contexts: Tensor

    @property
    def positions(self) -> Tensor:
        """``[s, queries]`` position of each query in its sequence."""
        offsets = torch.arange(self.shape.queries, device=self.rows.device)
        return self.contexts[:, None] + offsets


class Step:
    """The values of one pass, from the arrays that the host prepared."""

    def __init__(
        self,
        executable: TorchExecutable,
        shape: StepShape,
        arrays: Mapping[str, Tensor],
        sampling: SamplingShape | None,
    ) -> None:
        self.executable = executable
        self.shape = shape
        self.arrays = arrays
        self.sampling = sampling
        self.sampled: Sampled | None = None
        self.state = executable.state
        self.device = executable.device
        inputs = executable.program.inputs
        renamed = {"token_ids": "tokens"}
        self._values = {value: arrays[renamed.get(n, n)] for n, value in inputs.items()}
        self._rounded: dict[tuple[int, str, float], Tensor] = {}
        self._ropes: dict[int, tuple[Tensor, Tensor]] = {}

    def run(self, taps: Sequence[str]) -> dict[str, Tensor]:
        """Runs every node (sampling only if there are its arrays); results of the taps."""
        tapped: dict[str, Tensor] = {}
        executable = self.executable
        for node, dead in executable.schedule:
            if node.op == "sample" and self.sampling is None:
                continue
            self.run_node(node)
            if node.name in taps:
                tapped[node.name] = self._values[node.outputs[-1]]
            for value in dead:
                self._values.pop(value, None)
            if dead and self._rounded:
                self._rounded = {k: v for k, v in self._rounded.items() if k[0] not in dead}
        return tapped

    def run_node(self, node: Node) -> None:
        results = self.executable.kernel(node).run(self, node)
        if isinstance(results, Tensor):
            results = (results,)
        for value, result in zip(node.outputs, results, strict=True):
            self._values[value] = result

    # Values -----------------------------------------------------------------------------

    def x(self, value: int) -> Tensor:
        """A value: a result, an input, or a weight in float32."""
        if value in self._values:
            return self._values[value]
        weight = self.weight(value)
        return weight.data if weight.data.dtype == torch.float32 else weight.floats()

    def weight(self, value: int) -> TorchWeight:
        return self.executable.weights[value]

    def rounded(self, value: int, weight: TorchWeight, threshold: float) -> Tensor:
        """What a weight sees of a value: its columns in the order of the codes, in the plan's
        activation format. Kept, for the layers that share an input."""
        int8 = weight.rounds and self.executable.plan.activation == "int8"
        if not int8 and weight.permutation is None:
            return self.x(value)
        key = (value, weight.name if weight.permutation is not None else "", threshold)
        if key not in self._rounded:
            self._rounded[key] = prepare(self.x(value), weight, int8, threshold)
        return self._rounded[key]

    # The batch --------------------------------------------------------------------------

    def segments(self) -> Iterator[Segment]:
        for index, shape in enumerate(self.shape.segments):
            names = ("members", "rows", "lengths", "contexts")
            yield Segment(index, shape, *(self.arrays[f"{name}.{index}"] for name in names))

    def slots(self, state: int) -> Tensor:
        """``[T]`` where the tokens' rows of a state go."""
        return self.arrays[f"slots.{self.state.group_of[state]}"]

    def table(self, name: str, state: int, segment: Segment) -> Tensor:
        """An index array of a state's group: "blocks", "first", "read" or "write"."""
        return self.arrays[f"{name}.{self.state.group_of[state]}.{segment.index}"]

    def rotations(self, rope: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[T, 1, dim / 2]`` of a rope; made once a step."""
        if rope not in self._ropes:
            spec = self.executable.program.ropes[rope]
            inverse = self.arrays.get(f"inverse.{rope}", self.executable.frequencies[rope])
            angles = (self.arrays["positions"].float()[:, None] * inverse)[:, None, :]
            factor = attention_factor(spec)
            self._ropes[rope] = (angles.cos().mul_(factor), angles.sin().mul_(factor))
        return self._ropes[rope]
