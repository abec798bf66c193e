"""How fast each weight format runs: one linear layer of a real size, beside the ceiling.

The cases of the conformance suite are too small to say. What falls back to a slow path is right
there; here it shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from sartor.backends.base import Backend, Executable, Probed, Profiled
from sartor.backends.conformance import (
    Case,
    RandomWeights,
    case_program,
    cases,
    lacking,
    make_batch,
)
from sartor.errors import UnsupportedError
from sartor.graph import Builder, StepShape, Value
from sartor.hardware import Ceilings, Work, bound
from sartor.plan import ExecutionPlan
from sartor.progress import SILENT, Progress, showing

SIZE = 768  # inputs and outputs: a multiple of every group
LENGTHS = (32, 32)
REPEATS = 8
CEILING_SECONDS = 0.1
SLOW = 0.3
"""Of the fastest format in the same arithmetic: what is below fell back to something else."""


@dataclass(frozen=True)
class Speed:
    """The best of several runs. ``share`` of the arithmetic's peak; the weights are in a cache."""

    operator: str
    format: str
    path: str
    microseconds: float
    operations_per_s: float
    share: float


def slow(speeds: Sequence[Speed]) -> list[Speed]:
    """Those far behind the others of their operator."""
    best: dict[str, float] = {}
    for speed in speeds:
        best[speed.operator] = max(best.get(speed.operator, 0.0), speed.operations_per_s)
    return [s for s in speeds if s.operations_per_s < SLOW * best[s.operator]]


def measure_speed(backend: Backend, isa: str = "auto", progress: Progress = SILENT) -> list[Speed]:
    """Every format of ``linear`` on the first device, 64 rows at once.

    UnsupportedError for a backend that cannot measure its ceilings.
    """
    device = backend.devices()[0].name
    if not isinstance(backend, Probed):
        raise UnsupportedError(f"backend {backend.name} has no way to measure what it can reach")
    with showing(progress, f"measuring {device}", seconds=4 * CEILING_SECONDS):
        ceilings = backend.ceilings(device, CEILING_SECONDS, isa=isa)
    capabilities = backend.capabilities(device)
    chosen = [
        case
        for case in cases()
        if case.operator in ("linear/int8", "linear/fp32") and not lacking(case, capabilities)
    ]
    speeds = []
    with showing(progress, f"timing {backend.name}", len(chosen), "formats"):
        for case in chosen:
            progress.part(f"{case.operator} {case.format}")
            speeds.append(time_case(backend, case, device, isa, ceilings))
            progress.advance(1)
    return speeds


def time_case(backend: Backend, case: Case, device: str, isa: str, ceilings: Ceilings) -> Speed:
    """The format of a ``linear`` case at the size of this module."""
    wide = dataclasses.replace(case, width=SIZE, build=_square)
    program = case_program(wide)
    plan = ExecutionPlan(backend=backend.name, device=device, isa=isa).replace(**case.plan)
    weights = backend.pack(program, RandomWeights(program, wide), plan, None)
    executable: Executable = backend.compile(program, weights, plan, device, (case.tap,))
    if not isinstance(executable, Profiled):
        raise UnsupportedError(f"backend {backend.name} cannot time its operators")
    executable.allocate_state([])
    batch = make_batch(program, plan.block_size, case.tap, LENGTHS)
    seconds = float("inf")
    for _ in range(REPEATS):
        executable.profile(True)
        executable.collect(executable.submit(batch))
        seconds = min(seconds, dict(executable.seconds())["op"])
    path = executable.kernel_path("op")
    counted = executable.work()
    work = counted.node(counted.program.node("op"), StepShape(LENGTHS, (0, 0), sum(LENGTHS)))
    least = bound(Work(operations=work.operations), ceilings)
    return Speed(
        case.operator,
        case.format,
        path,
        seconds * 1e6,
        sum(work.operations.values()) / seconds,
        least.seconds / seconds,
    )


def _square(b: Builder, x: Value) -> Value:
    return b.linear(x, "op", SIZE)
