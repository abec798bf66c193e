"""What a driver is: one engine in a process and environment of its own.

A request is one JSON object a line on standard input, its answer one on standard output:
``load``, ``single``, ``batch``, and ``ceilings`` and ``work`` where an engine can tell; an answer
with ``error`` says why there is no other. Only the standard library is needed here. The phases are
those of ``sartor.bench.phases``: greedy decoding, in which every token chosen is the next one's
input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Tokens = Sequence[int]
Answer = dict[str, Any]


@dataclass(frozen=True)
class Load:
    """What to load: a GGUF file, and where an engine reads none, a bf16 folder of the same weights.

    ``sequences`` run at once at most, each of at most ``context`` tokens. ``plan`` has fields of
    Sartor's execution plan; other engines get none.
    """

    model: str
    folder: str
    threads: int
    sequences: int
    context: int
    plan: Answer = field(default_factory=dict)


class Driver(ABC):
    """One engine."""

    @abstractmethod
    def load(self, request: Load) -> Answer:
        """Loads a model; answers ``version``, ``settings``, and facts where there are some."""

    @abstractmethod
    def single(self, seed: int, prompt: Tokens, steps: int) -> Answer:
        """``prompt_seconds`` to the first token, ``decode_seconds`` of ``steps`` more."""

    @abstractmethod
    def batch(self, seed: int, prompts: Sequence[Tokens], steps: int) -> Answer:
        """``decode_seconds`` of ``steps`` steps in which every prompt gets one token each."""

    def ceilings(self, seconds: float) -> Answer:
        """What the machine can reach, for the engine that can tell; ``seconds`` of each loop."""
        raise RuntimeError(f"{type(self).__name__} measures no ceilings")

    def work(self, batches: Sequence[int]) -> Answer:
        """What every row asks of the machine, for the engine that can tell."""
        raise RuntimeError(f"{type(self).__name__} does not count its work")


class LoopDriver(Driver):
    """An engine that is driven step by step from here."""

    @abstractmethod
    def start(self, prompts: Sequence[Tokens]) -> None:
        """Reads the prompts and chooses the first token of each."""

    @abstractmethod
    def step(self) -> None:
        """One more token for every sequence."""

    @abstractmethod
    def end(self) -> None:
        """Forgets the sequences."""

    def prepare(self, sequences: int) -> None:
        """Whatever ``sequences`` sequences need that is not part of the work measured."""

    def single(self, seed: int, prompt: Tokens, steps: int) -> Answer:
        prompt_seconds, decode_seconds = self._run([prompt], steps)
        return {"prompt_seconds": prompt_seconds, "decode_seconds": decode_seconds}

    def batch(self, seed: int, prompts: Sequence[Tokens], steps: int) -> Answer:
        return {"decode_seconds": self._run(prompts, steps)[1]}

    def _run(self, prompts: Sequence[Tokens], steps: int) -> tuple[float, float]:
        """Seconds of the prompts and of the steps."""
        self.prepare(len(prompts))
        try:
            started = time.perf_counter()
            self.start(prompts)
            begun = time.perf_counter()
            for _ in range(steps):
                self.step()
            return begun - started, time.perf_counter() - begun
        finally:  # what failed should not weigh on what comes next
            self.end()


def serve(driver: Driver) -> None:
    """Answers requests until standard input ends."""
    # Engines print what they like to file 1; the answers keep a copy of it to themselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = _answer(driver, json.loads(line))
        except Exception as error:  # the other side waits for a line, whatever happens
            text = " ".join(str(error).split())
            answer = {"error": f"{type(error).__name__}: {text}"[:500]}
        print(json.dumps(answer), file=answers, flush=True)


def _answer(driver: Driver, request: Answer) -> Answer:
    command = request.pop("command")
    if command == "load":
        started = time.perf_counter()
        facts = driver.load(Load(**request))
        return {**facts, "load_seconds": time.perf_counter() - started}
    if command not in ("single", "batch", "ceilings", "work"):
        raise ValueError(f"no command is called {command!r}")
    answer: Answer = getattr(driver, command)(**request)
    return answer
