"""The reference backend: a program interpreted operator by operator in numpy.

It defines what is right. It is slow and needs nothing but numpy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import psutil

from sartor.backends.base import Device, MemoryUse, PackedWeights, WeightSource
from sartor.backends.loading import load_weights
from sartor.backends.reference.state import ReferenceState
from sartor.backends.reference.step import Step
from sartor.errors import UsageError
from sartor.graph import Batch, Capabilities, LowRank, Program, StepOutput
from sartor.graph.passes import logits_linear
from sartor.ops import CORE_OPERATORS, FUSED_OPERATORS
from sartor.ops.weights import F32, Weight
from sartor.plan import ExecutionPlan


class ReferenceWeights:
    """Canonical weights, kept as they are."""

    def __init__(self, weights: dict[str, Weight]) -> None:
        self.by_name = weights

    @property
    def nbytes(self) -> int:
        parts = [(w.data, w.scale, w.offset) for w in self.by_name.values()]
        return sum(array.nbytes for part in parts for array in part if array is not None)

    @property
    def bits_per_weight(self) -> float:
        total = sum(w.data.size for w in self.by_name.values())
        return sum(w.format.bits_per_weight * w.data.size for w in self.by_name.values()) / total


class ReferenceBackend:
    """Every operator and format, on any machine."""

    name = "reference"

    def devices(self) -> list[Device]:
        memory = psutil.virtual_memory().total
        return [Device("reference", self.name, "numpy reference", memory)]

    def capabilities(self, device: str) -> Capabilities:
        return Capabilities(
            operators=frozenset(CORE_OPERATORS),
            fused=frozenset(FUSED_OPERATORS),
            weight_formats=frozenset({"dense", "affine", "lookup", "fp8"}),
            activations=frozenset({"fp32", "int8"}),
            kv_formats=frozenset({"fp32", "bf16", "fp16", "int8"}),
            adapters=True,
            copies=True,
        )

    def pack(
        self, program: Program, source: WeightSource, plan: ExecutionPlan, cache: Path | None
    ) -> ReferenceWeights:
        return ReferenceWeights(load_weights(program, source))

    def compile(
        self,
        program: Program,
        weights: PackedWeights,
        plan: ExecutionPlan,
        device: str,
        taps: Sequence[str] = (),
    ) -> ReferenceExecutable:
        assert isinstance(weights, ReferenceWeights)
        for tap in taps:
            program.node(tap)
        return ReferenceExecutable(program, weights, plan.replace(backend=self.name, device=device))


class ReferenceExecutable:
    """Runs a program node by node."""

    def __init__(self, program: Program, weights: ReferenceWeights, plan: ExecutionPlan) -> None:
        self.program = program
        self.plan = plan
        self._weights = weights
        self._by_value = {
            value: weights.by_name[spec.name] for value, spec in program.weight_values().items()
        }
        self.logits = logits_linear(program)
        self.state = ReferenceState(program, plan)
        self.adapters: dict[int, Mapping[str, LowRank]] = {}
        self._dense: dict[int, F32] = {}
        self._finished: dict[int, StepOutput] = {}
        self._next_handle = 0

    def block_bytes(self, group: int) -> int:
        return self.state.block_bytes(group)

    def allocate_state(self, blocks: Sequence[int]) -> None:
        self.state.allocate(blocks)

    def load_adapter(self, index: int, layers: Mapping[str, LowRank]) -> None:
        self.adapters[index] = layers

    def drop_adapter(self, index: int) -> None:
        del self.adapters[index]

    def memory(self) -> MemoryUse:
        adapters = sum(a.nbytes for layers in self.adapters.values() for a in layers.values())
        return MemoryUse(self._weights.nbytes + adapters, self.state.nbytes, 0)

    def kernel_path(self, node: str) -> str:
        return f"numpy {self.program.node(node).op}"

    def close(self) -> None:
        self.state.free()

    def submit(self, batch: Batch) -> int:
        batch.validate()
        if not self.state.allocated:
            raise UsageError("reference backend: allocate_state before the first step")
        handle = self._next_handle
        self._next_handle += 1
        self.state.copy(batch)
        self._finished[handle] = Step(self, self._resolved(batch)).run()
        return handle

    def collect(self, handle: int) -> StepOutput:
        return self._finished.pop(handle)

    def _resolved(self, batch: Batch) -> Batch:
        """Tokens that name an output in flight: here the last step has always finished."""
        if not len(batch.tokens) or batch.tokens.min() >= 0:
            return batch
        last = self._finished[self._next_handle - 2].tokens
        names = np.where(batch.tokens < 0, -1 - batch.tokens, 0)
        tokens = np.where(batch.tokens < 0, last[names], batch.tokens).astype(np.int32)
        return dataclasses.replace(batch, tokens=tokens)

    def dense(self, value: int) -> F32:
        if value not in self._dense:
            self._dense[value] = self._by_value[value].dequantize()
        return self._dense[value]

    def weight(self, value: int) -> Weight:
        return self._by_value[value]
