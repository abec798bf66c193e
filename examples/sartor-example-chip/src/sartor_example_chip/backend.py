"""The backend: what Sartor asks of a chip before a program runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil
from sartor.backends.base import Device, PackedWeights, WeightSource
from sartor.errors import UsageError
from sartor.graph import Capabilities, Program
from sartor.ops import CORE_OPERATORS
from sartor.plan import ExecutionPlan

from sartor_example_chip.executable import FUSED, ExampleExecutable
from sartor_example_chip.weights import ExampleWeights, pack


class ExampleBackend:
    """An imaginary chip that calculates in float64, on the processor and in numpy."""

    name = "example"

    def devices(self) -> list[Device]:
        """Ask the driver here; an empty list where there is no chip, and no exception."""
        memory = psutil.virtual_memory().total
        return [Device("example", self.name, "float64 in numpy, to start from", memory)]

    def capabilities(self, device: str) -> Capabilities:
        """Only what is true: Sartor believes it, and the conformance suite checks it.

        All operators, as numpy runs those without a kernel. ``weight_formats`` names what stays
        packed: nothing but dense, as this chip widens weights when it packs them.
        """
        return Capabilities(
            operators=frozenset(CORE_OPERATORS),
            fused=FUSED,
            weight_formats=frozenset({"dense"}),
            activations=frozenset({"fp32"}),
            kv_formats=frozenset({"fp32"}),
            adapters=True,
        )

    def pack(
        self, program: Program, source: WeightSource, plan: ExecutionPlan, cache: Path | None
    ) -> ExampleWeights:
        """``cache`` is not used: packed files hold the layout of Sartor's own CPU kernels, and
        widening is quick. A chip with a costly layout writes its own files there."""
        return pack(program, source)

    def compile(
        self,
        program: Program,
        weights: PackedWeights,
        plan: ExecutionPlan,
        device: str,
        taps: Sequence[str] = (),
    ) -> ExampleExecutable:
        assert isinstance(weights, ExampleWeights)
        memory = {found.name: found.memory_bytes for found in self.devices()}
        if device not in memory:
            raise UsageError(
                f"backend example has no device {device!r}; choose {', '.join(memory)}"
            )
        plan = plan.replace(backend=self.name, device=device)
        return ExampleExecutable(program, weights, plan, memory[device], frozenset(taps))
