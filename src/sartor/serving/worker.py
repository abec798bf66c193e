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
from pathlib import Path

import msgspec

from sartor.engine.engine import Engine
from sartor.engine.load import load, make_engine
from sartor.engine.request import Chunk
from sartor.errors import CapacityError, SartorError, UsageError
from sartor.serving.channel import Receiver, Sender
from sartor.serving.messages import (
    Abort,
    Beat,
    Chunks,
    Failed,
    FromWorker,
    HostedModel,
    ModelSpec,
    Ready,
    Refused,
    Submit,
    ToWorker,
    WorkerConfig,
)

logger = logging.getLogger(__name__)
_IDLE_SECONDS = 0.2
_GRACE_SECONDS = 2.0


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


def _load(specs: tuple[ModelSpec, ...]) -> tuple[dict[str, Engine], list[HostedModel]]:
    engines: dict[str, Engine] = {}
    hosted: list[HostedModel] = []
    for spec in specs:
        begin = time.monotonic()
        try:
            cache = None if spec.cache is None else Path(spec.cache)
            engine = make_engine(load(Path(spec.path), spec.plan, spec.name, cache))
        except Exception as error:
            if not isinstance(error, SartorError):
                logger.exception("model %s could not be loaded", spec.name)
            hosted.append(HostedModel(spec.name, error=describe(error)))
            continue
        engines[spec.name] = engine
        hosted.append(HostedModel(spec.name, engine.context_length, time.monotonic() - begin))
    return engines, hosted


def describe(error: BaseException) -> str:
    """An error in one line: our own speak for themselves, others are named by type."""
    return str(error) if isinstance(error, SartorError) else f"{type(error).__name__}: {error}"


def _take(message: ToWorker, engines: dict[str, Engine], outbox: Sender[FromWorker]) -> None:
    engine = engines.get(message.model)
    match message:
        case Abort(request_id=request_id):
            if engine is not None:
                engine.abort(request_id)
        case Submit(model=model, request=request):
            try:
                if engine is None:
                    raise SartorError(f"model {model} is not loaded in this worker")
                engine.add(request)
            except Exception as error:
                invalid = isinstance(error, UsageError | CapacityError)
                if not isinstance(error, SartorError):
                    logger.exception("request %s was not taken", request.id)
                outbox.send(Refused(model, request.id, describe(error), invalid))


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
    engines: dict[str, Engine],
    inbox: Receiver[ToWorker],
    outbox: Sender[FromWorker],
    pulse: Pulse,
) -> None:
    """The loop: take what came, one step of each engine that has work, send what it gave."""
    while not pulse.stopping.is_set():
        busy = any(engine.has_work for engine in engines.values())
        for message in inbox.receive(0.0 if busy else _IDLE_SECONDS):
            _take(message, engines, outbox)
        for name, engine in engines.items():
            if engine.has_work:
                chunks = engine.step()
                _check_failures(chunks)
                if chunks:
                    outbox.send(Chunks(name, chunks))
                pulse.turn()
        pulse.turn()


def run(config: WorkerConfig) -> int:
    """Serves until the gateway is gone; the exit status is 1 after an error, which it reports."""
    outbox: Sender[FromWorker] = Sender(config.outbox, config.key)
    pulse = Pulse()
    for target in (_follow_parent, _beat):
        threading.Thread(target=target, args=(config, pulse), daemon=True).start()
    try:
        inbox: Receiver[ToWorker] = Receiver(config.folder, config.key, ToWorker)
        engines, hosted = _load(config.models)
        if not engines:
            outbox.send(Failed("; ".join(f"{model.name}: {model.error}" for model in hosted)))
            return 1
        pulse.watch()
        outbox.send(Ready(inbox.address, tuple(hosted)))
        _turn(engines, inbox, outbox, pulse)
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
