"""What tuning brings: a model's speed with the default kernels and with those that were chosen."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sartor.backends.base import Tunable
from sartor.bench import phases
from sartor.bench.report import Spread
from sartor.engine.engine import Engine
from sartor.engine.load import LoadedModel, called, make_encoder, make_engine
from sartor.errors import SartorError
from sartor.progress import SILENT, Progress, showing

SIZES = ((512, 64), (128, 16), (32, 8))
"""Tokens of the prompt and of decoding; a slow machine takes the smaller ones."""

CONTEXT = sum(SIZES[0]) + 1
PAIRS = 3  # that are to fit, at least
MOST_PAIRS = 24


@dataclass(frozen=True)
class Gain:
    """Tokens a second with the default kernels and with the chosen ones, in runs that took turns.
    Equal where every kernel that was chosen is the default."""

    before: Spread
    after: Spread

    @property
    def share(self) -> float:
        """Of the medians: 0.1 is 10 % faster."""
        return self.after.median / self.before.median - 1


@dataclass(frozen=True)
class _Run:
    """Tokens a second by phase, and what was computed."""

    rates: Mapping[str, float]
    result: object


_Once = Callable[[int, int], _Run]


def measure_gain(
    loaded: LoadedModel, seconds: float, progress: Progress = SILENT
) -> dict[str, Gain]:
    """By phase: ``prompt_512`` and ``decode``, or ``text_512`` of a model that makes vectors.

    Takes about ``seconds``, and at least one run with either kernels; the executable must be
    :class:`Tunable`, and the plan without a prefix cache. Nothing where the context is shorter
    than the smallest prompt. SartorError where both do not compute the same.
    """
    executable = loaded.executable
    assert isinstance(executable, Tunable)
    once = _writer(loaded) if loaded.writes_text else _encoder(loaded)
    fitting = [size for size in SIZES if sum(size) < loaded.context_length]
    if not fitting:
        return {}
    differ = any(timing.chosen and timing.variant for timing in executable.timings())
    with showing(progress, f"speed of {called(loaded.name)}, before and after", seconds=seconds):
        try:
            runs = _take_turns(executable, once, fitting, seconds, differ)
        finally:
            executable.use_tuned(True)
    results = {run.result for pair in runs for run in pair}
    if len(results) > 1:
        raise SartorError(
            f"{loaded.name}: the kernels that were chosen here compute something else than the "
            "default ones; this is a fault in sartor: please report it"
        )
    found = {}
    for name in runs[0][0].rates:
        before, after = (Spread.of([pair[i].rates[name] for pair in runs]) for i in (0, -1))
        found[name] = Gain(before, after)
    return found


def _take_turns(
    executable: Tunable,
    once: _Once,
    fitting: list[tuple[int, int]],
    seconds: float,
    differ: bool,
) -> list[tuple[_Run, ...]]:
    """Pairs of runs with the default kernels and with the chosen ones, in changing order."""
    ways = (False, True) if differ else (True,)
    begin = time.perf_counter()
    prompt, decode = fitting[-1]
    once(prompt, decode)  # caches, buffers and the clock settle
    started = time.perf_counter()
    once(prompt, decode)
    each = time.perf_counter() - started
    for size in fitting:
        # By tokens: fewer of them take longer each, so the time is rather less than this.
        cost = each * sum(size) / (prompt + decode) * (len(ways) * PAIRS + 1)
        if cost <= seconds - (time.perf_counter() - begin):
            break
    once(*size)
    runs: list[tuple[_Run, ...]] = []
    longest = 0.0
    while len(runs) < MOST_PAIRS:
        started = time.perf_counter()
        if runs and started - begin + longest > seconds:
            break
        pair = {}
        for way in ways if len(runs) % 2 else ways[::-1]:
            executable.use_tuned(way)
            pair[way] = once(*size)
        runs.append(tuple(pair[way] for way in ways))
        longest = max(longest, time.perf_counter() - started)
    return runs


def _writer(loaded: LoadedModel) -> _Once:
    engine: Engine = make_engine(loaded)

    def once(prompt: int, decode: int) -> _Run:
        one = phases.single(engine, 0, prompt_tokens=prompt, decode_tokens=decode)
        return _Run({f"prompt_{prompt}": one.prompt, "decode": one.decode}, one.tokens)

    return once


def _encoder(loaded: LoadedModel) -> _Once:
    encoder = make_encoder(loaded)
    vocab = loaded.executable.program.vocab

    def once(length: int, decode: int) -> _Run:
        del decode
        request = phases.synthetic_request(loaded.tokenizer, vocab, 0, length)
        started = time.perf_counter()
        encoder.add(request)
        (chunk,) = encoder.step()
        seconds = time.perf_counter() - started
        if chunk.error is not None:
            raise SartorError(f"the model failed while it was measured: {chunk.error}")
        return _Run({f"text_{length}": length / seconds}, chunk.embedding)

    return once
