"""Runs one worker process: spawns it, listens to it, ends it, starts the next one.

Everything here happens on the event loop's thread, but for one thread per process that waits for
its end. :class:`Lifecycle` decides; the supervisor is its only writer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from sartor.serving.channel import connected_ends
from sartor.serving.ending import Ending, explain, oom_kills
from sartor.serving.environment import child_environment
from sartor.serving.lifecycle import Death, Kill, Lifecycle, Phase, Start, Timing
from sartor.serving.loop_channel import LoopChannel
from sartor.serving.messages import (
    AdapterLoaded,
    Beat,
    Chunks,
    EngineStats,
    Failed,
    FromWorker,
    ModelSpec,
    Ready,
    Refused,
    ToWorker,
    WorkerConfig,
)

logger = logging.getLogger(__name__)
_TICK_SECONDS = 0.1
_PAUSE_SECONDS = 1.0
_LAST_WORDS_SECONDS = 0.05
_END_SECONDS = 5.0


class Listener(Protocol):
    """Who wants to know. Called on the event loop."""

    def worker_ready(self, message: Ready) -> None: ...

    def worker_chunks(self, message: Chunks) -> None: ...

    def worker_refused(self, message: Refused) -> None: ...

    def adapter_loaded(self, message: AdapterLoaded) -> None: ...

    def engine_stats(self, message: EngineStats) -> None: ...

    def worker_died(self, cause: str, death: Death) -> None:
        """A worker is gone; another one starts, unless ``worker_failed`` follows."""

    def worker_failed(self, cause: str) -> None:
        """The worker is given up."""


class WorkerProcess:
    """One process and the channel to it.

    ``receive`` and, last of all, ``exited`` are called on the event loop.
    """

    def __init__(
        self,
        receive: Callable[[WorkerProcess, FromWorker], None],
        exited: Callable[[WorkerProcess, Ending], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._receive = receive
        self._exited = exited
        self._last_words = ""
        self._final = False
        self._killed_for = ""
        self._oom_kills = oom_kills()
        self._silent = False
        self._dead = False
        self._over = False

    async def start(
        self, models: Sequence[ModelSpec], beat_seconds: float, memory_bytes: int | None
    ) -> None:
        """Nothing is left behind where it fails or is cancelled."""
        here, there = connected_ends()
        with contextlib.closing(there), contextlib.ExitStack() as undo:
            self._channel: LoopChannel[FromWorker, ToWorker] = await LoopChannel.open(
                here, FromWorker, self._received, self._silenced
            )
            undo.callback(self._channel.close)
            interpreter, variables = _interpreter()
            # A pipe and not multiprocessing: nothing of this process is imported again over
            # there, and the pipe's end tells the worker that the gateway is gone.
            self._process = subprocess.Popen(
                [interpreter, "-P", "-m", "sartor.serving.worker"],
                env=child_environment(PYTHONPATH=import_path(), **variables),
                stdin=subprocess.PIPE,
                stdout=2,  # standard output may carry somebody's JSON
                pass_fds=there.descriptors(),
            )
            undo.callback(self._abandon)
            self.pid = self._process.pid
            config = WorkerConfig(
                tuple(models), there.tickets(self.pid), beat_seconds, memory_bytes
            )
            assert self._process.stdin is not None
            # A worker that is dead already is noticed by the thread.
            with contextlib.suppress(OSError):
                self._process.stdin.write(msgspec.json.encode(config) + b"\n")
                self._process.stdin.flush()
            threading.Thread(target=self._wait, name=f"worker-{self.pid}", daemon=True).start()
            undo.pop_all()

    def send(self, message: ToWorker) -> None:
        self._channel.send(message)

    def kill(self, cause: str) -> None:
        self._killed_for = cause
        self._process.kill()

    def hang_up(self) -> None:
        """Closes the pipe, on which the worker ends itself."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def close(self) -> None:
        """Frees what is left of it; the process must have ended."""
        self.hang_up()
        self._channel.close()

    def _abandon(self) -> None:
        self._process.kill()
        self._process.wait()
        self.hang_up()

    def _received(self, message: FromWorker) -> None:
        if isinstance(message, Failed):
            self._last_words, self._final = message.cause, message.final
        else:
            self._receive(self, message)

    def _silenced(self, error: Exception | None) -> None:
        self._silent = True
        if error is not None:
            logger.error("a worker could not be read", exc_info=error)
            self.kill(f"the gateway could not read the worker: {type(error).__name__}: {error}")
        if self._dead:
            self._end()

    def _wait(self) -> None:
        self._process.wait()
        # A closed loop means that the gateway is going down, and nobody waits any more.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._died)

    def _died(self) -> None:
        # What it said last may still be on its way; a process that it started may hold its end
        # of the channel open.
        self._dead = True
        if self._silent:
            self._end()
        else:
            self._loop.call_later(_LAST_WORDS_SECONDS, self._end)

    def _end(self) -> None:
        if not self._over:
            self._over = True
            self._exited(self, self._ending())

    def _ending(self) -> Ending:
        code = self._process.returncode
        if self._last_words or self._killed_for:  # a kill of ours is not one from outside
            return Ending("itself", self._last_words or self._killed_for, self._final)
        return explain(code, self._oom_kills, oom_kills())


class Supervisor:
    """Keeps one worker for ``models`` running and tells the ``listener`` about it."""

    def __init__(
        self,
        models: Sequence[ModelSpec],
        timing: Timing,
        listener: Listener,
        memory_bytes: int | None = None,
    ) -> None:
        """``memory_bytes`` is what a worker may take; None: no limit."""
        self._memory_bytes = memory_bytes
        self._models = tuple(models)
        self._timing = timing
        self._listener = listener
        self._lifecycle = Lifecycle(timing, time.monotonic())
        self._process: WorkerProcess | None = None
        self._task: asyncio.Task[None] | None = None
        self._gone = asyncio.Event()
        self._gone.set()
        self._closing = False
        self._told = ""

    @property
    def phase(self) -> Phase:
        return self._lifecycle.phase

    @property
    def cause(self) -> str:
        """Why the last worker ended; empty once the next one is ready."""
        return self._lifecycle.cause

    @property
    def retry_seconds(self) -> int | None:
        """When to ask again for a worker that was given up; None where none was."""
        seconds = self._lifecycle.retry_seconds(time.monotonic())
        return None if seconds is None else max(1, math.ceil(seconds))

    @property
    def silence(self) -> float | None:
        """Seconds since the worker's last sign of life; None while it is not ready."""
        return self._lifecycle.silence(time.monotonic())

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        self._task = asyncio.create_task(self._supervise(), name="supervisor")

    def host(self, models: Sequence[ModelSpec]) -> None:
        """What the next worker hosts."""
        self._models = tuple(models)

    def ensure_ready(self) -> None:
        self._lifecycle.ensure(time.monotonic())

    def send(self, message: ToWorker) -> None:
        """To the worker that is ready; without one the message is moot, since all is replayed."""
        if self._process is not None and self._lifecycle.phase == "ready":
            self._process.send(message)

    async def close(self) -> None:
        """Ends the worker: asks first, kills after a while."""
        self._closing = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._process is None:
            return
        self._process.hang_up()
        try:
            await asyncio.wait_for(self._gone.wait(), _END_SECONDS)
        except TimeoutError:
            self._process.kill("it did not end by itself")
            await self._gone.wait()

    async def _supervise(self) -> None:
        while not self._closing:
            match self._lifecycle.tick(time.monotonic()):
                case Start():
                    await self._spawn()
                case Kill(cause=cause) if self._process is not None:
                    logger.warning("killing worker %d: %s", self._process.pid, cause)
                    self._process.kill(cause)
                case _:
                    begin = time.monotonic()
                    await asyncio.sleep(_TICK_SECONDS)
                    if (slept := time.monotonic() - begin) > _PAUSE_SECONDS:
                        self._lifecycle.excuse(slept)

    async def _spawn(self) -> None:
        process = WorkerProcess(self._on_message, self._on_exit)
        try:
            await process.start(self._models, self._timing.beat, self._memory_bytes)
        except Exception as error:  # no process: this start has failed, like any other
            logger.exception("no worker process")
            self._ended(Ending("itself", f"the worker process cannot be started: {error}"))
        else:
            self._process = process
            self._gone.clear()

    def _on_message(self, process: WorkerProcess, message: FromWorker) -> None:
        if process is not self._process:
            return
        try:
            self._handle(process, message)
        except Exception as error:  # what the message was to bring is lost: have it computed again
            logger.exception("a worker's message could not be handled")
            process.kill(f"a message could not be handled: {type(error).__name__}: {error}")

    def _handle(self, process: WorkerProcess, message: FromWorker) -> None:
        now = time.monotonic()
        match message:
            case Ready():
                self._lifecycle.ready(now)
                self._listener.worker_ready(message)
            case Beat(stuck_seconds=stuck):
                self._lifecycle.beat(now, stuck)
            case Chunks():
                self._lifecycle.worked()
                self._listener.worker_chunks(message)
            case Refused():
                self._listener.worker_refused(message)
            case AdapterLoaded():
                self._listener.adapter_loaded(message)
            case EngineStats():
                self._listener.engine_stats(message)

    def _on_exit(self, process: WorkerProcess, ending: Ending) -> None:
        process.close()
        self._process = None
        self._gone.set()
        self._ended(ending)

    def _ended(self, ending: Ending) -> None:
        if self._closing:
            return
        life = self._lifecycle
        death = life.exited(time.monotonic(), ending.cause, ending.blame, final=ending.final)
        cause = life.cause
        given_up_at_once = life.phase == "failed" and not life.ever_ready
        # The end of a start that never came to anything is for whoever started it to tell; one
        # that fails again and again for one reason has told it.
        if not given_up_at_once and (death != "start" or cause != self._told):
            logger.warning("the worker is gone: %s", cause)
        self._told = cause
        self._listener.worker_died(cause, death)
        if self._lifecycle.phase == "failed":
            self._listener.worker_failed(cause)


def import_path() -> str:
    """Where this process finds its modules, so that the worker runs the very same code."""
    return os.pathsep.join(entry or os.getcwd() for entry in sys.path)


def _interpreter() -> tuple[str, dict[str, str]]:
    """The Python for a worker, and what its environment needs."""
    base: str = getattr(sys, "_base_executable", sys.executable)
    if sys.platform == "win32" and base != sys.executable:
        # In a virtual environment there is a launcher, whose child would not get the sockets.
        return base, {"__PYVENV_LAUNCHER__": sys.executable}
    return sys.executable, {}
