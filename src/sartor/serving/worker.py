"""The worker process: hosts models, turns their engines, answers in chunks.

Started as ``python -m sartor.serving.worker`` with its configuration on standard input. That
pipe is also its tie to the gateway: when it closes, whatever the reason, the worker ends.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
import threading
import time

import msgspec

from sartor.engine.request import Chunk
from sartor.errors import CapacityError, SartorError, UsageError
from sartor.serving.channel import Channel, open_end
from sartor.serving.hosting import Host, describe, host
from sartor.serving.idle import IdleTuning
from sartor.serving.log_lines import format_all_lines, log_to_stderr
from sartor.serving.messages import (
    Abort,
    AdapterLoaded,
    Beat,
    Chunks,
    DropAdapter,
    Failed,
    FromWorker,
    HostedModel,
    LoadAdapter,
    Ready,
    Refused,
    Submit,
    ToWorker,
    WorkerConfig,
)
from sartor.serving.meter import Reporter
from sartor.serving.time_slice import lengthen_time_slice

logger = logging.getLogger(__name__)
_IDLE_SECONDS = 0.2
_GRACE_SECONDS = 2.0
_PAUSE_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1
ToGateway = Channel[ToWorker, FromWorker]


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

    def excuse(self, seconds: float) -> None:
        """The whole process did not run for so long, so the loop could not turn."""
        self._last += seconds

    def stuck_seconds(self) -> float:
        return max(0.0, time.monotonic() - self._last) if self._watched else 0.0


def _beat(channel: ToGateway, beat_seconds: float, pulse: Pulse) -> None:
    begin = time.monotonic()
    while not pulse.stopping.wait(beat_seconds):
        begin, slept = time.monotonic(), time.monotonic() - begin
        if slept > beat_seconds + _PAUSE_SECONDS:
            pulse.excuse(slept)
        channel.send(Beat(pulse.stuck_seconds()))


def _follow_parent(pulse: Pulse) -> None:
    # An unbuffered read on the descriptor: it returns nothing once the gateway's end is closed,
    # and takes no lock that a daemon thread would hold while the interpreter goes down.
    while os.read(0, 4096):
        continue
    pulse.stopping.set()
    time.sleep(_GRACE_SECONDS)
    os._exit(0)


def _die_with_parent() -> None:
    """A call that never returns may hold the interpreter's lock, and then no thread follows the
    parent: Linux is asked to do so (prctl(2))."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _take(message: ToWorker, hosting: Host, channel: ToGateway) -> None:
    running = hosting.models.get(message.model)
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
                channel.send(Refused(model, request.id, describe(error), invalid))
        case LoadAdapter(model=model, adapter=adapter):
            problem = f"model {model} is not loaded in this worker"
            error_text = problem if running is None else hosting.load_adapter(model, adapter)
            channel.send(AdapterLoaded(model, adapter.name, error_text))
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
    hosting: Host, channel: ToGateway, pulse: Pulse, tuning: IdleTuning, reporter: Reporter
) -> None:
    """The loop: take what came, one step of each engine that has work, send what it gave; or
    measure kernels for a while, when nobody has asked for long."""
    models = hosting.models
    while not pulse.stopping.is_set():
        busy = any(running.engine.has_work for running in models.values())
        messages = channel.receive(0.0 if busy or tuning.due() else _IDLE_SECONDS)
        for message in messages:
            _take(message, hosting, channel)
        if busy or messages:
            tuning.busy()
        elif tuning.due():
            tuning.slice()
        for name, running in models.items():
            if running.engine.has_work:
                chunks = running.engine.step()
                _check_failures(chunks)
                if chunks:
                    channel.send(Chunks(name, chunks))
                pulse.turn()
        reporter.turn(idle=not (busy or messages))
        pulse.turn()


def _named(report: HostedModel) -> str:
    """Why a model could not be loaded, with its name, which some errors begin with."""
    error = report.error or ""
    return error if report.name in error else f"{report.name}: {error}"


def run(config: WorkerConfig) -> int:
    """Serves until the gateway is gone; the exit status is 1 after an error, which it reports."""
    channel: ToGateway = Channel(open_end(config.channel), ToWorker)
    pulse = Pulse()
    beat = (channel, config.beat_seconds, pulse)
    threading.Thread(target=_follow_parent, args=(pulse,), daemon=True).start()
    threading.Thread(target=_beat, args=beat, daemon=True).start()
    lengthen_time_slice()  # of the threads that are to come, too: only these compute
    try:
        hosting = host(config.models, config.memory_bytes)
        format_all_lines()
        models = hosting.models
        if not models:
            # An error that is the same for all of them is told once.
            problems = dict.fromkeys(_named(report) for report in hosting.reports)
            final = all(report.final for report in hosting.reports)
            channel.send(Failed("; ".join(problems), final))
            return 1
        gc.freeze()  # a collection that looked through all of this would hold up a step
        pulse.watch()
        channel.send(Ready(tuple(hosting.reports), hosting.process_bytes))
        tuning = IdleTuning(running.engine.executable for running in models.values())
        reporter = Reporter({name: m.engine for name, m in models.items()}, channel.send)
        _turn(hosting, channel, pulse, tuning, reporter)
    except Exception as error:
        # The engine's state is in doubt: end, so that the gateway starts a sound worker and
        # replays. Its rule about repeated deaths then finds the request that is to blame.
        logger.exception("the worker ends")
        channel.send(Failed(describe(error)))
        return 1
    finally:
        pulse.stopping.set()
        channel.close(linger_seconds=_GRACE_SECONDS)
    return 0


def main() -> int:
    # Signals of a terminal or a service manager reach the whole group; the gateway decides.
    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    _die_with_parent()
    log_to_stderr()
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
