"""The worker process: hosts models, turns their engines, answers in chunks.

Started as ``python -m sartor.serving.worker`` with its configuration on standard input. That
pipe is also its tie to the gateway: when it closes, whatever the reason, the worker ends.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sartor.engine.encoder import Encoder
from sartor.engine.engine import Engine
from sartor.engine.fallback.model import FallbackModel
from sartor.engine.load import load, make_encoder, make_engine
from sartor.engine.peft import read_peft
from sartor.engine.request import Chunk
from sartor.errors import CapacityError, SartorError, UsageError
from sartor.models import Model
from sartor.serving.channel import Receiver, Sender
from sartor.serving.idle import IdleTuning
from sartor.serving.messages import (
    Abort,
    AdapterLoaded,
    AdapterSpec,
    Beat,
    Chunks,
    DropAdapter,
    Failed,
    FromWorker,
    HostedModel,
    LoadAdapter,
    ModelSpec,
    Ready,
    Refused,
    Submit,
    ToWorker,
    WorkerConfig,
)
from sartor.serving.meter import Reporter

logger = logging.getLogger(__name__)
_IDLE_SECONDS = 0.2
_GRACE_SECONDS = 2.0


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
            self.engine.load_adapter(spec.name, read_peft(Path(spec.path), self.model))
        except Exception as error:
            if not isinstance(error, SartorError):
                logger.exception("adapter %s could not be loaded", spec.name)
            return describe(error)
        return None


class Pulse:
    """When the loop last turned; written by the loop, read by the heartbeat's thread."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self._last = time.monotonic()
        self._watched = False

    def watch(self) -> None:
        """From here on the loop is expected to turn; loading may take as long as it takes."""
        self.turn()
        self._watched = True

    def turn(self) -> None:
        self._last = time.monotonic()

    def stuck_seconds(self) -> float:
        return time.monotonic() - self._last if self._watched else 0.0


def _beat(config: WorkerConfig, pulse: Pulse) -> None:
    sender: Sender[FromWorker] = Sender(config.outbox, config.key)
    while not pulse.stopping.wait(config.beat_seconds):
        sender.send(Beat(pulse.stuck_seconds()))
    sender.close()


def _follow_parent(config: WorkerConfig, pulse: Pulse) -> None:
    # An unbuffered read on the descriptor: it returns nothing once the gateway's end is closed,
    # and takes no lock that a daemon thread would hold while the interpreter goes down.
    while os.read(0, 4096):
        continue
    pulse.stopping.set()
    if config.folder is not None:  # a gateway that was killed could not clear it
        shutil.rmtree(config.folder, ignore_errors=True)
    time.sleep(_GRACE_SECONDS)
    os._exit(0)


def _load(specs: tuple[ModelSpec, ...]) -> tuple[dict[str, Running], list[HostedModel]]:
    models: dict[str, Running] = {}
    hosted: list[HostedModel] = []
    for spec in specs:
        begin = time.monotonic()
        try:
            cache = None if spec.cache is None else Path(spec.cache)
            loaded = load(Path(spec.path), spec.plan, spec.name, cache)
            make = make_engine if loaded.writes_text else make_encoder
            if loaded.note:
                print(f"note: {loaded.note}", file=sys.stderr, flush=True)
            running = Running(loaded.model, make(loaded))
        except Exception as error:
            if not isinstance(error, SartorError):
                logger.exception("model %s could not be loaded", spec.name)
            hosted.append(HostedModel(spec.name, error=describe(error)))
            continue
        models[spec.name] = running
        errors = {adapter.name: running.load_adapter(adapter) for adapter in spec.adapters}
        hosted.append(
            HostedModel(
                spec.name,
                running.engine.context_length,
                time.monotonic() - begin,
                adapter_errors={name: e for name, e in errors.items() if e is not None},
            )
        )
    return models, hosted


def describe(error: BaseException) -> str:
    """An error in one line: our own speak for themselves, others are named by type."""
    return str(error) if isinstance(error, SartorError) else f"{type(error).__name__}: {error}"


def _take(message: ToWorker, models: dict[str, Running], outbox: Sender[FromWorker]) -> None:
    running = models.get(message.model)
    match message:
        case Abort(request_id=request_id):
            if running is not None:
                running.engine.abort(request_id)
        case Submit(model=model, request=request):
            try:
                if running is None:
                    raise SartorError(f"model {model} is not loaded in this worker")
                running.engine.add(request)
            except Exception as error:
                invalid = isinstance(error, UsageError | CapacityError)
                if not isinstance(error, SartorError):
                    logger.exception("request %s was not taken", request.id)
                outbox.send(Refused(model, request.id, describe(error), invalid))
        case LoadAdapter(model=model, adapter=adapter):
            problem = f"model {model} is not loaded in this worker"
            error_text = problem if running is None else running.load_adapter(adapter)
            outbox.send(AdapterLoaded(model, adapter.name, error_text))
        case DropAdapter(name=name):
            if running is not None and name in running.adapters:
                running.drop_adapter(name)


def _check_failures(chunks: list[Chunk]) -> None:
    """Ends the worker over a step that failed for several requests at once.

    Most of them cannot be to blame. The gateway replays them and, should it happen again, runs
    them one at a time; then the error comes for one request only, and that one gets it.
    """
    errors = {chunk.request_id: chunk.error for chunk in chunks if chunk.finish_reason == "error"}
    if len(errors) > 1:
        raise SartorError(
            f"a step failed for {len(errors)} requests: {next(iter(errors.values()))}"
        )


def _turn(
    models: dict[str, Running],
    inbox: Receiver[ToWorker],
    outbox: Sender[FromWorker],
    pulse: Pulse,
    tuning: IdleTuning,
    reporter: Reporter,
) -> None:
    """The loop: take what came, one step of each engine that has work, send what it gave; or
    measure kernels for a while, when nobody has asked for long."""
    while not pulse.stopping.is_set():
        busy = any(running.engine.has_work for running in models.values())
        messages = inbox.receive(0.0 if busy or tuning.due() else _IDLE_SECONDS)
        for message in messages:
            _take(message, models, outbox)
        if busy or messages:
            tuning.busy()
        elif tuning.due():
            tuning.slice()
        for name, running in models.items():
            if running.engine.has_work:
                chunks = running.engine.step()
                _check_failures(chunks)
                if chunks:
                    outbox.send(Chunks(name, chunks))
                pulse.turn()
        reporter.turn(idle=not (busy or messages))
        pulse.turn()


def run(config: WorkerConfig) -> int:
    """Serves until the gateway is gone; the exit status is 1 after an error, which it reports."""
    outbox: Sender[FromWorker] = Sender(config.outbox, config.key)
    pulse = Pulse()
    for target in (_follow_parent, _beat):
        threading.Thread(target=target, args=(config, pulse), daemon=True).start()
    try:
        inbox: Receiver[ToWorker] = Receiver(config.folder, config.key, ToWorker)
        models, hosted = _load(config.models)
        if not models:
            outbox.send(Failed("; ".join(f"{model.name}: {model.error}" for model in hosted)))
            return 1
        pulse.watch()
        outbox.send(Ready(inbox.address, tuple(hosted)))
        tuning = IdleTuning(running.engine.executable for running in models.values())
        reporter = Reporter({name: m.engine for name, m in models.items()}, outbox.send)
        _turn(models, inbox, outbox, pulse, tuning, reporter)
    except Exception as error:
        # The engine's state is in doubt: end, so that the gateway starts a sound worker and
        # replays. Its rule about repeated deaths then finds the request that is to blame.
        logger.exception("the worker ends")
        outbox.send(Failed(describe(error)))
        return 1
    finally:
        pulse.stopping.set()
        outbox.close(linger_seconds=_GRACE_SECONDS)
    return 0


def main() -> int:
    # Signals of a terminal or a service manager reach the whole group; the gateway decides.
    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return 0
        line += byte
    code = run(msgspec.json.decode(line, type=WorkerConfig))
    sys.stderr.flush()
    # Threads of a backend must not hold up the end.
    os._exit(code)


if __name__ == "__main__":
    main()
