"""Where the time of a phase goes, by operator, beside the least that it could take."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sartor.backends.base import Executable, Profiled
from sartor.bench import phases
from sartor.engine.engine import Engine
from sartor.errors import UnsupportedError
from sartor.graph import ProgramWork, StepShape
from sartor.hardware import Bound, Ceilings, Work, bound
from sartor.progress import SILENT, Progress, showing


@dataclass(frozen=True)
class OperatorTime:
    """One operator of all layers, in one step (of a prompt: in all of its steps).

    ``bound`` is the least that its bytes and operations take; None for what multiplies nothing, and
    where the device's ceilings are not known.
    """

    seconds: float
    work: Work
    bound: Bound | None

    @staticmethod
    def of(seconds: float, work: Work, ceilings: Ceilings | None) -> OperatorTime:
        if ceilings is None or not work.operations:
            return OperatorTime(seconds, work, None)
        return OperatorTime(seconds, work, bound(work, ceilings))

    @staticmethod
    def total(parts: Iterable[OperatorTime], ceilings: Ceilings | None) -> OperatorTime:
        """Several, as if all of their bytes could move while all of their operations run."""
        found = list(parts)
        seconds = sum(part.seconds for part in found)
        return OperatorTime.of(seconds, sum((part.work for part in found), Work()), ceilings)

    @property
    def reached(self) -> float | None:
        """The share of the roofline."""
        return self.bound.seconds / self.seconds if self.bound and self.seconds else None

    def to_json_dict(self) -> dict[str, object]:
        return {
            "seconds": self.seconds,
            "bytes": self.work.bytes,
            "operations": dict(self.work.operations),
            "roofline_seconds": self.bound.seconds if self.bound else None,
            "limit": self.bound.limit if self.bound else None,
            "share_of_roofline": self.reached,
        }


def profiled(executable: Executable) -> Profiled:
    """The same executable; UnsupportedError where its backend cannot time nodes."""
    if isinstance(executable, Profiled):
        return executable
    raise UnsupportedError(
        f"backend {executable.plan.backend} cannot time its operators; measure without a profile"
    )


def operator_of(node: str) -> str:
    """All layers alike: ``model.layers.7.mlp.up_proj`` is ``model.layers.*.mlp.up_proj``."""
    return re.sub(r"\.\d+\.", ".*.", node)


def by_operator(seconds: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Adds up the layers. The slowest come first."""
    sums: dict[str, float] = {}
    for name, value in seconds:
        key = operator_of(name)
        sums[key] = sums.get(key, 0.0) + value
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def work_by_operator(work: ProgramWork, steps: Sequence[StepShape]) -> dict[str, Work]:
    """What the steps ask of the machine, layers added up."""
    sums: dict[str, Work] = {}
    for node in work.program.nodes:
        key = operator_of(node.name)
        sums[key] = sum((work.node(node, step) for step in steps), sums.get(key, Work()))
    return sums


def take_profile(
    engine: Engine,
    batches: Sequence[int],
    ceilings: Ceilings | None,
    progress: Progress = SILENT,
) -> dict[str, dict[str, OperatorTime]]:
    """One round of the phases with a timer around every node, by phase and operator."""
    timer = profiled(engine.executable)
    seconds: dict[str, dict[str, float]] = {}
    costs = phases.costs(batches)

    def mark(phase: str) -> None:
        if phase:
            seconds[phase] = by_operator(timer.seconds())
            progress.advance(costs[phase])
        timer.profile(True)  # from zero again

    with showing(progress, "timing the operators", sum(costs.values()), unit=""):
        timer.profile(True)
        phases.single(engine, 0, mark)
        for size in batches:
            phases.batch(engine, size, 0, mark)
        timer.profile(False)
    shapes = phases.shapes(batches, engine.executable.plan.max_batch_tokens)
    return {
        phase: _beside(times, timer.work(), shapes[phase], ceilings)
        for phase, times in seconds.items()
    }


def _beside(
    seconds: Mapping[str, float],
    work: ProgramWork,
    steps: Sequence[StepShape],
    ceilings: Ceilings | None,
) -> dict[str, OperatorTime]:
    """Times of a phase beside its work; of one step where every step is like the others."""
    # A prompt is read in chunks of different sizes: there the sum says more.
    count = len(steps) if steps[0].tokens == steps[0].outputs else 1
    works = work_by_operator(work, steps)
    return {
        name: OperatorTime.of(value / count, works[name] / count, ceilings)
        for name, value in seconds.items()
    }
