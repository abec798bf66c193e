"""A program on the chip, with its weights and its state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from sartor.backends.base import MemoryUse
from sartor.backends.reference.state import ReferenceState
from sartor.errors import CapacityError, UsageError
from sartor.graph import Batch, LowRank, Program, StepOutput
from sartor.graph.passes import fuse, logits_linear
from sartor.ops import Weight
from sartor.plan import ExecutionPlan

from sartor_example_chip.kernels import KERNELS
from sartor_example_chip.step import ExampleStep
from sartor_example_chip.weights import ExampleWeights

FUSED = frozenset({"add_rms_norm"})
"""The optional fused operators that the chip has a kernel for."""


class ExampleExecutable:
    """``memory_bytes`` is what the device has in all; ``taps`` are left out of fused nodes."""

    def __init__(
        self,
        program: Program,
        weights: ExampleWeights,
        plan: ExecutionPlan,
        memory_bytes: int,
        taps: frozenset[str],
    ) -> None:
        for tap in taps:
            program.node(tap)  # UsageError for a name that is not there
        self._given = program
        self.program = fuse(program, FUSED, taps)
        self.plan = plan
        self.logits = logits_linear(program)
        # Pages live in numpy: here the chip's memory is the host's. A chip with memory of its own
        # keeps the pages there, beside kernels for kv_write and attention.
        self.state = ReferenceState(program, plan)
        self.adapters: dict[int, Mapping[str, LowRank]] = {}
        self._weights = weights
        self._memory_bytes = memory_bytes
        names = {value: spec.name for value, spec in program.weight_values().items()}
        self.buffers: dict[int, npt.NDArray[np.float64]] = {
            value: weights.chip[name] for value, name in names.items() if name in weights.chip
        }
        self._host = {
            value: weights.host[name] for value, name in names.items() if name in weights.host
        }
        self._dense: dict[int, npt.NDArray[np.float32]] = {}
        self._finished: dict[int, StepOutput] = {}
        self._next_handle = 0

    # Weights of operators that run on the host -----------------------------------------

    def weight(self, value: int) -> Weight:
        return self._host[value]

    def dense(self, value: int) -> npt.NDArray[np.float32]:
        if value not in self._dense:
            self._dense[value] = self._host[value].dequantize()
        return self._dense[value]

    # State and adapters ----------------------------------------------------------------

    def block_bytes(self, group: int) -> int:
        return self.state.block_bytes(group)

    def allocate_state(self, blocks: Sequence[int]) -> None:
        wanted = sum(count * self.block_bytes(group) for group, count in enumerate(blocks))
        left = self._memory_bytes - self._weights.nbytes
        if wanted > left:
            raise CapacityError(
                f"backend example: {wanted} bytes of state do not fit beside the weights in the "
                f"{left} bytes that are left; choose a smaller max_context or state_bytes"
            )
        self.state.allocate(blocks)

    def load_adapter(self, index: int, layers: Mapping[str, LowRank]) -> None:
        self.adapters[index] = layers

    def drop_adapter(self, index: int) -> None:
        del self.adapters[index]

    # Steps -----------------------------------------------------------------------------

    def submit(self, batch: Batch) -> int:
        """Runs the step here and now. A chip that works by itself starts it, says
        ``asynchronous`` in its capabilities, and waits in ``collect``."""
        batch.validate()
        if not self.state.allocated:
            raise UsageError("backend example: allocate_state before the first step")
        handle = self._next_handle
        self._next_handle += 1
        self._finished[handle] = ExampleStep(self, batch).run()
        return handle

    def collect(self, handle: int) -> StepOutput:
        return self._finished.pop(handle)

    # What it says of itself ------------------------------------------------------------

    def memory(self) -> MemoryUse:
        adapters = sum(a.nbytes for layers in self.adapters.values() for a in layers.values())
        widened = sum(array.nbytes for array in self._dense.values())
        return MemoryUse(self._weights.nbytes + widened + adapters, self.state.nbytes, 0)

    def kernel_path(self, node: str) -> str:
        """``chip`` or ``host``, and the operator as it runs, so fused ones under their own name."""
        found = self._given.node(node)
        made_by = {value: n.op for n in self.program.nodes for value in n.outputs}
        op = made_by[found.outputs[0]] if found.outputs else found.op
        return f"{'chip fp64' if op in KERNELS else 'host'} {op}"

    def close(self) -> None:
        self.state.free()
        self._dense.clear()
