"""Which engine does what when: rows one after another, engines alternating round by round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from engines import Engine, EngineError, EngineLost

from sartor.bench import phases
from sartor.errors import SartorError

PAUSE = 0.3
"""Seconds between engines: the threads of the one before have gone to sleep by then."""

Prompts = Callable[[int, int], Sequence[int]]
"""Token ids by seed and length, the same for every engine."""


@dataclass(frozen=True)
class Workload:
    """What is measured at once. ``batch`` 0: one prompt, then decoding after it."""

    batch: int

    @property
    def rows(self) -> tuple[str, ...]:
        if self.batch:
            return (f"batch_{self.batch}",)
        return (f"prompt_{phases.PROMPT_TOKENS}", "decode")

    def rates(self, engine: Engine, seed: int, prompts: Prompts) -> dict[str, float]:
        """Tokens a second by row, under the definitions of ``sartor bench``."""
        if self.batch:
            answer = engine.ask(
                "batch",
                seed=seed,
                prompts=[
                    list(prompts(seed + i, phases.BATCH_PROMPT_TOKENS)) for i in range(self.batch)
                ],
                steps=phases.BATCH_DECODE_TOKENS,
            )
            tokens = self.batch * phases.BATCH_DECODE_TOKENS
            return {self.rows[0]: tokens / answer["decode_seconds"]}
        answer = engine.ask(
            "single",
            seed=seed,
            prompt=list(prompts(seed, phases.PROMPT_TOKENS)),
            steps=phases.DECODE_TOKENS,
        )
        prompt, decode = self.rows
        return {
            prompt: phases.PROMPT_TOKENS / answer["prompt_seconds"],
            decode: phases.DECODE_TOKENS / answer["decode_seconds"],
        }


@dataclass
class Samples:
    """``rates[row][engine]``: one a counted round. ``failed[row][engine]``: why there are none."""

    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)


def run_rounds(
    engines: Mapping[str, Engine],
    workloads: Sequence[Workload],
    rounds: int,
    prompts: Prompts,
    *,
    pause: float = PAUSE,
    tell: Callable[[str], None] = lambda text: None,
) -> Samples:
    """Every workload on every engine, ``rounds`` times after one that is not counted.

    A round takes all engines in turn, and each round another one first, so that a disturbance of
    the machine hits all of them alike. An engine that fails is left out of the rest of that
    workload, and where its process is lost, of all that follow; what it measured before is
    dropped, as its rounds would not be those of the others.
    """
    samples = Samples()
    lost: dict[str, str] = {}
    for workload in workloads:
        failed = dict(lost)
        found: dict[str, dict[str, list[float]]] = {row: {} for row in workload.rows}
        for round_, names in zip(range(rounds + 1), turns(list(engines)), strict=False):
            tell(f"{', '.join(workload.rows)}: round {round_} of {rounds}")
            for name in names:
                if name in failed:
                    continue
                time.sleep(pause)
                try:
                    rates = workload.rates(engines[name], round_, prompts)
                except EngineError as error:
                    failed[name] = str(error)
                    if isinstance(error, EngineLost):
                        lost[name] = str(error)
                    continue
                if round_ == 0:  # caches, clocks and pages warm up
                    continue
                for row, rate in rates.items():
                    found[row].setdefault(name, []).append(rate)
        for row in workload.rows:
            samples.rates[row] = {n: r for n, r in found[row].items() if n not in failed}
            samples.failed[row] = dict(failed)
    if not any(samples.rates.values()):
        reasons = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise SartorError(f"no engine could be measured ({reasons})")
    return samples


def turns(names: Sequence[str]) -> Iterator[list[str]]:
    """The order of each round: a rotation, without end."""
    first = 0
    while names:
        yield [*names[first:], *names[:first]]
        first = (first + 1) % len(names)
