"""What a worker hosts: models loaded one after the other, within the memory that it may take."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from sartor.backends.base import Executable
from sartor.engine.encoder import Encoder
from sartor.engine.engine import Engine
from sartor.engine.fallback.model import FallbackModel
from sartor.engine.load import LoadedModel, load, make_encoder, make_engine
from sartor.engine.peft import read_peft
from sartor.engine.scratch import scratch_bytes
from sartor.errors import CapacityError, SartorError, UsageError
from sartor.hardware import MemoryLedger
from sartor.models import Model
from sartor.progress.line import ProgressLine
from sartor.serving.log_lines import say
from sartor.serving.messages import AdapterSpec, HostedModel, ModelSpec

logger = logging.getLogger(__name__)
PROCESS = "process"
"""Who holds what belongs to no model: interpreter, libraries, tokenizers, requests."""
REQUEST_BYTES = 32 << 20
"""Kept for requests on their way, and for what the allocator does not give back."""


@dataclass(frozen=True)
class Running:
    """A model that is ready, and the engine that runs it."""

    model: Model | FallbackModel
    engine: Engine | Encoder

    @property
    def adapters(self) -> tuple[str, ...]:
        return () if isinstance(self.engine, Encoder) else self.engine.adapters

    def drop_adapter(self, name: str) -> None:
        if isinstance(self.engine, Engine):
            self.engine.drop_adapter(name)

    def load_adapter(self, spec: AdapterSpec) -> str | None:
        """Makes an adapter usable; what is wrong with it, or None."""
        try:
            if isinstance(self.engine, Encoder):
                raise UsageError(f"adapter {spec.name}: this model makes embeddings, not text")
            program = self.engine.executable.program
            self.engine.load_adapter(spec.name, read_peft(Path(spec.path), self.model, program))
        except Exception as error:
            if not isinstance(error, SartorError):
                logger.exception("adapter %s could not be loaded", spec.name)
            return describe(error)
        return None


@dataclass
class Host:
    """The models of a worker.

    ``ledger`` has the leases of all of them. Where it has a limit, weights and scratch are leased
    as they are, then what the process takes beside, and the rest is divided for state.
    """

    ledger: MemoryLedger
    models: dict[str, Running]
    reports: list[HostedModel]

    @property
    def process_bytes(self) -> int:
        """What is leased for the process itself; known where there is a limit."""
        return sum(lease.nbytes for lease in self.ledger.leases if lease.owner == PROCESS)

    def load_adapter(self, name: str, adapter: AdapterSpec) -> str | None:
        """Makes an adapter of a model usable; what is wrong with it, or None."""
        running = self.models[name]
        if (error := running.load_adapter(adapter)) is not None:
            return error
        try:
            self.ledger.lease(name, "weights", running.engine.executable.memory().weights)
        except CapacityError as capacity:
            running.drop_adapter(adapter.name)
            return str(capacity)
        return None


def host(specs: Sequence[ModelSpec], limit: int | None) -> Host:
    """Loads every model that can be loaded; what is wrong with others is in their reports."""
    hosting = Host(MemoryLedger(limit), {}, [])
    loaded: list[tuple[ModelSpec, LoadedModel, float]] = []
    for spec in specs:
        begin = time.monotonic()
        try:
            cache = None if spec.cache is None else Path(spec.cache)
            model = load(Path(spec.path), spec.plan, spec.name, cache, progress=ProgressLine())
            for note in model.notes:
                whose = f"{spec.name}: " if len(specs) > 1 else ""
                say(f"note: {whose}{note}")
            _lease_model(hosting.ledger, model)
        except Exception as error:
            _give_up(hosting, spec, error)
            continue
        loaded.append((spec, model, time.monotonic() - begin))
    if limit is not None and loaded:
        try:
            _lease_process(hosting.ledger, [model for _, model, _ in loaded])
        except SartorError as error:
            for spec, _, _ in loaded:
                _give_up(hosting, spec, error)
            return hosting
    for index, (spec, model, seconds) in enumerate(loaded):
        begin = time.monotonic()
        try:
            running = _run(hosting.ledger, model, len(loaded) - index)
        except Exception as error:
            _give_up(hosting, spec, error)
            continue
        hosting.models[spec.name] = running
        errors = {a.name: hosting.load_adapter(spec.name, a) for a in spec.adapters}
        hosting.reports.append(
            HostedModel(
                spec.name,
                running.engine.context_length,
                seconds + time.monotonic() - begin,
                adapter_errors={name: e for name, e in errors.items() if e is not None},
                plan=running.engine.executable.plan,
                memory=_held(running.engine.executable),
            )
        )
    return hosting


def _lease_model(ledger: MemoryLedger, model: LoadedModel) -> None:
    executable = model.executable
    # Before anything of a large model is touched: packed files are mapped, not read.
    ledger.lease(model.name, "weights", executable.memory().weights)
    scratch = executable.memory().scratch
    if ledger.limit is not None:
        scratch = scratch_bytes(executable, model.context_length)
    ledger.lease(model.name, "scratch", scratch)


def _lease_process(ledger: MemoryLedger, models: Sequence[LoadedModel]) -> None:
    """What the process holds beside its models. On devices with memory of their own, nothing."""
    if any(model.executable.memory().free is not None for model in models):
        return
    # The largest steps have run: weights and scratch are resident now.
    resident = psutil.Process().memory_info().rss
    ledger.lease(PROCESS, "resident", max(0, resident - ledger.used))
    ledger.lease(PROCESS, "requests", REQUEST_BYTES)


def _run(ledger: MemoryLedger, model: LoadedModel, sharers: int) -> Running:
    if not model.writes_text:
        return Running(model.model, make_encoder(model))
    budget = None if ledger.free is None else ledger.free // sharers
    engine = make_engine(model, budget)
    ledger.lease(model.name, "state", model.executable.memory().state)
    return Running(model.model, engine)


def _held(executable: Executable) -> dict[str, int]:
    use = executable.memory()
    return {"weights": use.weights, "state": use.state, "scratch": use.scratch}


def _give_up(hosting: Host, spec: ModelSpec, error: Exception) -> None:
    if not isinstance(error, SartorError):
        logger.exception("model %s could not be loaded", spec.name)
    hosting.ledger.release(spec.name)
    # What we understand is wrong with the model, the options or the limit, and stays wrong.
    final = isinstance(error, SartorError)
    hosting.reports.append(HostedModel(spec.name, error=describe(error), final=final))


def describe(error: BaseException) -> str:
    """An error in one line: our own speak for themselves, others are named by type."""
    return str(error) if isinstance(error, SartorError) else f"{type(error).__name__}: {error}"
