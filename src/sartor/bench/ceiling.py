"""How fast a phase could be at most: its work over what the machine can reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sartor.backends.base import Executable, Probed, Profiled
from sartor.backends.registry import load_backend
from sartor.bench import phases
from sartor.graph import ProgramWork
from sartor.hardware import Ceilings, Limit, Work, bound


@dataclass(frozen=True)
class PhaseWork:
    """``work`` of all steps of a phase, and how many tokens it reads or writes."""

    tokens: int
    work: Work


@dataclass(frozen=True)
class PhaseCeiling:
    """The most tokens a second, and what stands in the way of more."""

    tokens_per_s: float
    limit: Limit


def measure_ceilings(executable: Executable, seconds: float) -> Ceilings | None:
    """Of the device, path and threads that an executable runs on; None where nobody can tell.

    Takes ``seconds`` for each of several loops.
    """
    plan = executable.plan
    if not isinstance(executable, Profiled):
        return None
    backend = load_backend(plan.backend)
    if not isinstance(backend, Probed):
        return None
    return backend.ceilings(plan.device, seconds, threads=plan.threads, isa=plan.isa)


def phase_work(
    work: ProgramWork, batches: Sequence[int], max_batch_tokens: int
) -> dict[str, PhaseWork]:
    """By name of the phase."""
    return {
        name: PhaseWork(
            sum(step.tokens for step in steps), sum((work.step(step) for step in steps), Work())
        )
        for name, steps in phases.shapes(batches, max_batch_tokens).items()
    }


def phase_ceiling(phase: PhaseWork, ceilings: Ceilings) -> PhaseCeiling:
    """Tokens a second if nothing but memory, or nothing but arithmetic, took time."""
    least = bound(phase.work, ceilings)
    return PhaseCeiling(phase.tokens / least.seconds, least.limit)


def phase_ceilings(work: Mapping[str, PhaseWork], ceilings: Ceilings) -> dict[str, PhaseCeiling]:
    return {name: phase_ceiling(phase, ceilings) for name, phase in work.items()}
