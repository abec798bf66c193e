"""The tuner: which of a linear kernel's variants is fastest here, found by measuring.

Variants give the same bits (``LinearVariant`` in native/core/kernels.hpp), so a choice changes
speed alone, and may be made at any time between two steps.
"""

from __future__ import annotations

import bisect
import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sartor.backends.base import KernelTiming
from sartor.backends.cpu import _native
from sartor.backends.cpu.packing import PackedMatrix
from sartor.backends.cpu.tuned import TunedStore
from sartor.graph import Node, Program
from sartor.progress import SILENT, Progress, showing

BUDGET_SECONDS = 10.0  # of measuring, for one model
GAIN = 0.03  # a variant that saves less is not worth leaving the default for
PASS_SECONDS = 0.004  # one variant, once over some layers
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
MOST_OUTPUT_ROWS = 16  # layers over output rows seldom see more
TASKS_A_THREAD = 2  # at least: with one, a thread that is put aside holds up the others
FINALISTS = 3  # the default among them
ROUNDS = range(6, 25)  # of the finalists
_PASSES = 60  # of one layer and number of rows, about
_OPERATORS = ("linear", "linear_group", "grouped_linear", "head_linear")


@dataclass(frozen=True)
class LinearVariant:
    """One way to multiply; the fields are those of the native type."""

    streams: int = 0
    tiles: bool = True
    task_blocks: int = 0
    task_rows: int = _native.TASK_ROWS

    def native(self) -> tuple[int, bool, int, int]:
        return self.streams, self.tiles, self.task_blocks, self.task_rows

    def changes(self) -> dict[str, int]:
        """The fields that are not as by default; empty for the default."""
        return {
            name: int(value) for name, value in vars(self).items() if value != vars(DEFAULT)[name]
        }

    @classmethod
    def of(cls, changes: Mapping[str, int]) -> LinearVariant:
        """The inverse of :meth:`changes`. TypeError for a field that there is not."""
        given = dict(changes)
        return cls(tiles=bool(given.pop("tiles", True)), **given)


DEFAULT = LinearVariant()


class Executor(Protocol):
    """What the tuner needs of ``_native.Executor``."""

    def set_variant(
        self, instruction: int, bucket: int, variant: tuple[int, bool, int, int]
    ) -> None: ...
    def time_linears(
        self, instructions: Sequence[int], rows: int, variant: tuple[int, bool, int, int]
    ) -> list[float]: ...


@dataclass(frozen=True)
class Layers:
    """Linear layers that are alike: their instructions, which are one thing to the tuner.

    ``slots``: rows that a token gives to the matrices (of experts). ``group``: of the scales;
    0 where the codes are no integers. ``blocks``: column blocks of all matrices of a layer.
    """

    operator: str
    activation: str
    format: str
    n: int
    k: int
    experts: int
    slots: int
    group: int
    blocks: int
    outputs_only: bool
    instructions: tuple[int, ...]


def linear_layers(
    program: Program,
    matrices: Mapping[str, PackedMatrix],
    activation: Callable[[int, PackedMatrix], str],
    skip: frozenset[str],
) -> list[Layers]:
    """The layers of a fused program whose instructions are its nodes, in order.

    ``activation(node index, matrix)`` names the arithmetic; nodes of the operators in ``skip``
    run elsewhere.
    """
    specs = program.weight_values()
    alike: dict[object, tuple[Node, str, list[PackedMatrix], list[int]]] = {}
    for index, node in enumerate(program.nodes):
        if node.op not in _OPERATORS or node.op in skip:
            continue
        names = [specs[v].name for v in node.inputs if v in specs]
        used = [matrices[name] for name in names if name in matrices]
        arithmetic = activation(index, used[0])
        shapes = tuple((m.storage, m.bits, m.group, m.n, m.k, m.offsets is None) for m in used)
        key = node.op, arithmetic, program.values[node.outputs[0]].shape, shapes, used[0].experts
        alike.setdefault(key, (node, arithmetic, used, []))[3].append(index)
    return [_layers(program, *found) for found in alike.values()]


def _layers(
    program: Program, node: Node, activation: str, matrices: list[PackedMatrix], at: list[int]
) -> Layers:
    first, shape = matrices[0], program.values[node.outputs[0]].shape
    formats = [m.format_name for m in matrices]
    grouped = node.op in ("grouped_linear", "head_linear")
    assert isinstance(shape[-1], int)
    return Layers(
        operator=node.op,
        activation=activation,
        format=formats[0] if len(set(formats)) == 1 else "+".join(formats),
        n=sum(m.n for m in matrices),
        k=first.k,
        experts=first.experts,
        slots=shape[-1] // first.n if grouped else 1,
        group=min(m.group for m in matrices) if all(m.integer_codes for m in matrices) else 0,
        blocks=sum(-(-m.n // _native.LANES) for m in matrices),
        outputs_only=shape[0] == "R",
        instructions=tuple(at),
    )


@dataclass(frozen=True)
class Traits:
    """What variants a path has; as ``LinearTraits`` in native/core/kernels.hpp."""

    streams: int
    direct_rows: int
    tiles: bool


@dataclass(frozen=True)
class Job:
    """Layers and a number of tokens: one choice to make."""

    layers: Layers
    tokens: int

    @property
    def rows(self) -> int:
        return self.tokens * self.layers.slots

    @property
    def bucket(self) -> int:
        return bisect.bisect_left(_native.ROW_TOPS, self.rows)

    @property
    def weight(self) -> float:
        """Its part of the budget: more rows take longer, but less than in proportion."""
        return 1 + self.rows / 32

    def layer(self, threads: int) -> tuple[object, ...]:
        """As :attr:`KernelTiming.layer`."""
        x = self.layers
        return x.operator, x.activation, x.format, x.n, x.k, x.experts, self.rows, threads

    def timing(
        self, threads: int, variant: LinearVariant, seconds: float, *, chosen: bool
    ) -> KernelTiming:
        x = self.layers
        return KernelTiming(
            operator=x.operator,
            activation=x.activation,
            format=x.format,
            n=x.n,
            k=x.k,
            experts=x.experts,
            rows=self.rows,
            threads=threads,
            variant=variant.changes(),
            seconds=seconds,
            chosen=chosen,
        )


def jobs_of(layers: Sequence[Layers]) -> list[Job]:
    """One for each layer and bucket of rows, the fewest tokens first."""
    found: dict[tuple[Layers, int], Job] = {}
    for tokens in TOKENS:
        for x in layers:
            if not x.outputs_only or tokens <= MOST_OUTPUT_ROWS:
                job = Job(x, tokens)
                found.setdefault((x, job.bucket), job)
    return list(found.values())


def candidates(job: Job, traits: Traits, threads: int) -> list[LinearVariant]:
    """The default, and what may be faster."""
    x, rows = job.layers, job.rows
    whole = _native.TASK_ROWS
    least = TASKS_A_THREAD * threads
    found = {DEFAULT: None}
    if x.group and rows <= traits.direct_rows:
        cuts = [(0, whole), *((blocks, whole) for blocks in (4, 8, 16, 32, 64))]
        ways = [DEFAULT, LinearVariant(streams=1)] if traits.streams > 1 else [DEFAULT]
    else:
        cuts = [(blocks, whole) for blocks in (0, 2, 4, 8, 16, 32)]
        cuts += [(blocks, task) for task in (32, 16) if task < rows for blocks in (4, 8, 16)]
        tiles = traits.tiles and x.group > 16 and rows > 8
        ways = [DEFAULT, LinearVariant(tiles=False)] if tiles else [DEFAULT]
    for way in ways:
        for blocks, task in cuts:
            tasks = -(-x.blocks // blocks) * -(-rows // task) if blocks else least
            top = whole if job.bucket == len(_native.ROW_TOPS) else _native.ROW_TOPS[job.bucket]
            if tasks >= least and blocks <= _native.most_blocks(min(task, top)):
                found[dataclasses.replace(way, task_blocks=blocks, task_rows=task)] = None
    return list(found)


def typical(samples: Sequence[float]) -> float:
    """The mean of the fastest quarter: what else the machine does only ever adds."""
    fastest = sorted(samples)[: -(-len(samples) // 4)]
    return sum(fastest) / len(fastest)


class Tuner:
    """Measures job by job, in slices, until all is known or the budget is spent.

    ``store`` is where choices come from and go to; None keeps them in this process.
    """

    def __init__(
        self,
        executor: Executor,
        layers: Sequence[Layers],
        traits: Traits,
        threads: int,
        store: TunedStore | None,
        *,
        again: bool = False,
        budget: float = BUDGET_SECONDS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Looks up what is stored, which takes a few milliseconds at most; ``again`` does not,
        so that everything is measured anew."""
        self._executor = executor
        self._traits = traits
        self._threads = threads
        self._store = store
        self._clock = clock
        self._random = random.Random(0)
        self._left = budget
        self._slice = budget
        self._passed = 0  # jobs that are measured, or left out
        self._timings: dict[Job, list[KernelTiming]] = {}
        self._turns: dict[Layers, int] = {}
        self._seconds: dict[Layers, tuple[int, float]] = {}
        jobs = jobs_of(layers)
        if store is not None and not again:
            self._recall(jobs, store.read())
        self._jobs = [job for job in jobs if job not in self._timings]
        self._steps = self._measure_all()
        self._next = next(self._steps, None)

    def timings(self) -> list[KernelTiming]:
        """What is known of this program's layers; those with ``chosen`` are in use."""
        return [timing for timings in self._timings.values() for timing in timings]

    def run(self, seconds: float, progress: Progress = SILENT) -> bool:
        """Measures for about ``seconds``; True when there is nothing left to measure.

        A slice is longer only where a single layer, once, takes longer; jobs that are known to
        need that are left out.
        """
        self._slice = seconds
        if self._next is None or self._left <= 0:
            return True
        limit = min(seconds, self._left)
        with showing(progress, "measuring kernels", len(self._jobs), "layers", limit):
            progress.advance(self._passed)
            return self._run(seconds, progress)

    def _run(self, seconds: float, progress: Progress) -> bool:
        begin = self._clock()
        first = True
        while self._next is not None and self._left > 0:
            if not first and self._clock() - begin + self._next > seconds:
                return False
            first = False
            passed = self._passed
            self._next = next(self._steps, None)
            progress.advance(self._passed - passed)
        return True

    def use_chosen(self, on: bool) -> None:
        """The choices that were made, or the defaults in their place."""
        for job, timings in self._timings.items():
            chosen = next(timing.variant for timing in timings if timing.chosen)
            self._use(job, LinearVariant.of(chosen) if on else DEFAULT)

    def _recall(self, jobs: Sequence[Job], known: Sequence[KernelTiming]) -> None:
        by_layer: dict[object, list[KernelTiming]] = {}
        for timing in known:
            by_layer.setdefault(timing.layer, []).append(timing)
        for job in jobs:
            timings = by_layer.get(job.layer(self._threads), [])
            chosen = [timing for timing in timings if timing.chosen]
            try:
                self._use(job, LinearVariant.of(chosen[0].variant))
            except (IndexError, TypeError, ValueError):  # no choice, or one that is none here
                continue
            self._timings[job] = timings

    def _use(self, job: Job, variant: LinearVariant) -> None:
        bucket, native = job.bucket, variant.native()
        for instruction in job.layers.instructions:
            self._executor.set_variant(instruction, bucket, native)

    # The generators yield, before each pass, the seconds that it will take.

    def _measure_all(self) -> Iterator[float]:
        open_weight = sum(job.weight for job in self._jobs)
        for job in self._jobs:
            rows, seconds = self._seconds.get(job.layers, (job.rows, 0.0))
            if seconds * job.rows / rows <= self._slice:
                yield from self._measure(job, self._left * job.weight / open_weight)
            open_weight -= job.weight
            self._passed += 1

    def _measure(self, job: Job, share: float) -> Iterator[float]:
        """Screens all candidates, then compares the best of them in turns."""
        left = self._left
        rows, seconds = self._seconds.get(job.layers, (job.rows, 0.0))
        yield seconds * job.rows / rows
        self._pass(job, DEFAULT, 1)  # caches, buffers and the clock settle
        yield seconds * job.rows / rows
        one = self._pass(job, DEFAULT, 1)[0]
        self._seconds[job.layers] = job.rows, one
        wanted = min(PASS_SECONDS, share / _PASSES) / max(one, 1e-9)
        count = max(1, min(int(wanted), len(job.layers.instructions)))
        cost = one * count
        samples: dict[LinearVariant, list[float]] = {
            variant: [] for variant in candidates(job, self._traits, self._threads)
        }
        if cost * (2 * len(samples) + FINALISTS * ROUNDS.start) > self._left:
            return
        racing = list(samples)
        while True:
            for variant in self._shuffled(racing):
                yield cost
                samples[variant] += self._pass(job, variant, count)
            if len(racing) <= FINALISTS:
                break
            racing.sort(key=lambda variant: typical(samples[variant]))
            racing = racing[: max(FINALISTS, len(racing) // 2)]
            if DEFAULT not in racing:
                racing[-1] = DEFAULT
        rounds: list[dict[LinearVariant, list[float]]] = []
        while len(rounds) < ROUNDS.start or (
            len(rounds) < ROUNDS.stop - 1 and left - self._left < share
        ):
            rounds.append({})
            for variant in self._shuffled(racing):
                yield cost
                rounds[-1][variant] = self._pass(job, variant, count)
        self._settle(job, samples, rounds)

    def _shuffled(self, variants: Sequence[LinearVariant]) -> list[LinearVariant]:
        """In turns of their own order, so that nothing that recurs meets the same one again."""
        return self._random.sample(variants, len(variants))

    def _pass(self, job: Job, variant: LinearVariant, count: int) -> list[float]:
        """Times ``count`` layers: those whose turn it is, so that they come from where they
        come from in a step, and not from the cache of the pass before."""
        all_of_them = job.layers.instructions
        turn = self._turns.get(job.layers, 0)
        self._turns[job.layers] = turn + count
        chosen = [all_of_them[(turn + i) % len(all_of_them)] for i in range(count)]
        begin = self._clock()
        seconds = self._executor.time_linears(chosen, job.tokens, variant.native())
        self._left -= self._clock() - begin
        return seconds

    def _settle(
        self,
        job: Job,
        samples: Mapping[LinearVariant, Sequence[float]],
        rounds: Sequence[Mapping[LinearVariant, Sequence[float]]],
    ) -> None:
        """Chooses from the finalists' rounds alone: screening favoured who had luck."""
        half = len(rounds) // 2
        halves = rounds[:half], rounds[half:]

        def seconds(
            variant: LinearVariant, part: Sequence[Mapping[LinearVariant, Sequence[float]]]
        ) -> float:
            return typical([s for round_ in part for s in round_[variant]])

        best = min(rounds[0], key=lambda variant: seconds(variant, rounds))
        # Its worse half against the better one of the default: what else the machine does must not
        # decide.
        slow, fast = max(seconds(best, p) for p in halves), min(seconds(DEFAULT, p) for p in halves)
        if slow > (1 - GAIN) * fast:
            best = DEFAULT
        timings = [
            job.timing(
                self._threads,
                variant,
                seconds(variant, rounds) if variant in rounds[0] else typical(samples[variant]),
                chosen=variant == best,
            )
            for variant in samples
        ]
        self._timings[job] = timings
        self._use(job, best)
        if self._store is not None:
            self._store.add(timings)
