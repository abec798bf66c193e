"""Runs the phases on one model and reports medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sartor import __version__
from sartor.bench import phases
from sartor.bench.ceiling import measure_ceilings, phase_ceilings, phase_work
from sartor.bench.memory import peak_rss_bytes
from sartor.bench.profile import profiled, take_profile
from sartor.bench.report import BenchReport, Spread
from sartor.engine.engine import Engine
from sartor.engine.load import called, load, make_engine
from sartor.errors import CapacityError, UsageError
from sartor.hardware import inventory
from sartor.plan import ExecutionPlan
from sartor.progress import SILENT, Progress, showing

CEILING_SECONDS = 0.3
"""Of each loop that looks for a ceiling."""


def run_bench(
    path: Path,
    name: str,
    plan: ExecutionPlan,
    *,
    batches: Sequence[int] = (16,),
    repeats: int = 5,
    load_cache: Path | None = None,
    profile: bool = False,
    progress: Progress = SILENT,
) -> BenchReport:
    """Loads a checkpoint and measures it: greedy, synthetic prompts, no prefix cache.

    The phases take turns, ``repeats`` times after one round that is not counted, so that a
    disturbance of the machine hits all of them alike. The plan is widened where the largest
    batch needs it. The machine's ceilings are measured when all that is done. ``profile`` takes
    one more round with a timer around every operator, which slows it a little; no other number
    comes from that round. CapacityError when the context or the memory is too small, UsageError
    for a batch or a number of repeats below 1, and for a model that writes no text.
    """
    if repeats < 1 or not batches or min(batches) < 1:
        raise UsageError(
            f"bench: repeats is {repeats} and batches are {list(batches)}; all must be at least 1",
            fields=("repeats", "batches"),
        )
    sizes = sorted(set(batches))
    plan = _widened(plan, sizes[-1])
    started = time.perf_counter()
    loaded = load(path, plan, name, load_cache, progress=progress)
    if not plan.max_context:  # no more state than the phases use
        loaded = replace(loaded, plan=loaded.plan.replace(max_context=phases.CONTEXT))
    try:
        if not loaded.writes_text:
            raise UsageError(
                f"bench: {name} makes vectors of texts and writes none; take a model that writes"
            )
        if loaded.context_length < phases.CONTEXT:
            own = loaded.model.context_length >= phases.CONTEXT
            remedy = "raise max_context" if own else "take a model with a longer context"
            raise CapacityError(
                f"{name}: bench needs {phases.CONTEXT} tokens of context "
                f"({phases.PROMPT_TOKENS} of prompt, then {phases.DECODE_TOKENS}), but there are "
                f"{loaded.context_length}; {remedy}",
                fields=("max_context",),
            )
        if profile:
            profiled(loaded.executable)
        engine = make_engine(loaded)
        load_seconds = time.perf_counter() - started
        rates, host_share = measure(engine, sizes, repeats, progress, called(name))
        peak = peak_rss_bytes()
        with showing(progress, f"measuring {loaded.plan.device}", seconds=4 * CEILING_SECONDS):
            ceilings = measure_ceilings(engine.executable, CEILING_SECONDS)
        parts = take_profile(engine, sizes, ceilings, progress) if profile else {}
        limits = {}
        if ceilings is not None:
            work = profiled(engine.executable).work()
            limits = phase_ceilings(phase_work(work, sizes, loaded.plan.max_batch_tokens), ceilings)
    finally:
        loaded.executable.close()
    used = loaded.plan
    return BenchReport(
        model=name,
        version=__version__,
        machine=inventory().cpu,
        backend=used.backend,
        device=used.device,
        isa=used.isa,
        threads=used.threads,
        activation=used.activation,
        head_bits=used.head_bits,
        kv=used.kv,
        block_size=used.block_size,
        max_batch_tokens=used.max_batch_tokens,
        repeats=repeats,
        rates=rates,
        host_share=host_share,
        load_seconds=load_seconds,
        peak_rss_mb=peak / 1e6,
        bits_per_weight=loaded.bits_per_weight,
        ceilings=ceilings,
        limits=limits,
        profile=parts,
    )


def measure(
    engine: Engine,
    batches: Sequence[int],
    repeats: int,
    progress: Progress = SILENT,
    name: str = "",
) -> tuple[dict[str, Spread], float]:
    """Rates by name, and the median host share of single decoding."""
    samples: dict[str, list[float]] = {}
    shares: list[float] = []
    costs = phases.costs(batches)
    order = list(costs)
    round_ = 0

    def mark(phase: str) -> None:
        """The next one begins where this one has ended."""
        if phase:
            progress.advance(costs[phase])
            show(order[(order.index(phase) + 1) % len(order)])

    def show(phase: str) -> None:
        progress.part(f"{phase}, {round_ + 1} of {repeats + 1}")

    # Costs are no unit that people know: the share and the time are shown.
    total = (repeats + 1) * sum(costs.values())
    with showing(progress, f"measuring {name}", total, unit=""):
        for round_ in range(repeats + 1):
            show(order[0])
            one = phases.single(engine, round_, mark)
            found = {f"prompt_{phases.PROMPT_TOKENS}": one.prompt, "decode": one.decode}
            for size in batches:
                found[f"batch_{size}"] = phases.batch(engine, size, round_, mark)
            if round_ == 0:  # caches, clocks and pages warm up
                continue
            shares.append(one.host_share)
            for key, value in found.items():
                samples.setdefault(key, []).append(value)
    return {key: Spread.of(values) for key, values in samples.items()}, statistics.median(shares)


def _widened(plan: ExecutionPlan, largest: int) -> ExecutionPlan:
    """The plan with room for the largest batch."""
    return plan.replace(
        prefix_cache=False,
        max_sequences=max(plan.max_sequences, largest),
        # Twice: while some of a batch decode, the prompts of the others must go on.
        max_batch_tokens=max(plan.max_batch_tokens, 2 * largest),
    )
