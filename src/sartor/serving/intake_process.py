"""A process that prepares the longest requests, so that nobody else waits for them.

Started as ``python -m sartor.serving.intake_process`` when first needed, and ended after a while
without work. It speaks length-prefixed pickles over its standard streams with the one process that
started it, and ends when they close.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from sartor.engine.preset import Preset
from sartor.plan import ExecutionPlan
from sartor.serving.environment import child_environment
from sartor.serving.errors import ApiError, unavailable
from sartor.serving.frontend import ServedModel, open_served_model
from sartor.serving.log_lines import log_to_stderr
from sartor.serving.openai_types import ChatRequest, CompletionRequest, EmbeddingRequest
from sartor.serving.prepare import Prepared, View, prepare
from sartor.serving.supervisor import import_path

B = TypeVar("B", ChatRequest, CompletionRequest, EmbeddingRequest)
_IDLE_SECONDS = 60.0
_WORK_SECONDS = 120.0
_LOWERED = 10  # about a tenth of the processor beside others; 19 would starve it for minutes
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class _Facts:
    """What changes of a model while a server runs, and where its files are."""

    path: str
    plan: ExecutionPlan
    context_length: int
    aliases: frozenset[str]
    adapters: dict[str, Any]
    presets: dict[str, Preset]
    special_in_text: bool


@dataclass(frozen=True)
class _Job:
    kind: type[Any]
    body: bytes
    view: View
    models: dict[str, _Facts]


class IntakeProcess:
    """The process as its owner sees it: one request at a time, in order of arrival.

    ``work_seconds``: a request that takes longer is refused and costs the process its life.
    ``behind_others``: it runs at a lower priority.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        *,
        idle_seconds: float = _IDLE_SECONDS,
        work_seconds: float = _WORK_SECONDS,
        behind_others: bool = False,
    ) -> None:
        self._models = models
        self._idle_seconds = idle_seconds
        self._work_seconds = work_seconds
        self._behind_others = behind_others
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._idle: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def prepare(self, kind: type[B], body: bytes, view: View) -> Prepared[B]:
        """As :func:`sartor.serving.prepare.prepare`. Also raises ApiError 503 where the process
        dies, and 400 where the request takes it too long."""
        async with self._turn:
            self._stay()
            job = _Job(kind, body, view, {m.name: _facts(m) for m in self._models.values()})
            try:
                async with asyncio.timeout(self._work_seconds):
                    answer = await self._ask(job)
            except TimeoutError:
                await self._end()
                raise ApiError(
                    400,
                    f"the request could not be read in {self._work_seconds:g} s; send a shorter "
                    "or simpler one",
                    code="limit_exceeded",
                ) from None
            except (OSError, EOFError):
                await self._end()
                raise unavailable(
                    "the process that reads long requests has died; try again", retry_after=1
                ) from None
            except asyncio.CancelledError:
                await self._end()  # its answer would be taken for that of the next request
                raise
            self._leave_later()
        if isinstance(answer, ApiError):
            raise answer
        return cast(Prepared[B], answer)

    async def close(self) -> None:
        async with self._turn:
            self._stay()
            await self._end()

    async def _ask(self, job: _Job) -> object:
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "sartor.serving.intake_process",
                *(["behind-others"] if self._behind_others else []),
                env=child_environment(PYTHONPATH=import_path()),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        data = pickle.dumps(job, pickle.HIGHEST_PROTOCOL)
        process.stdin.write(_LENGTH.pack(len(data)))
        process.stdin.write(data)
        await process.stdin.drain()
        (length,) = _LENGTH.unpack(await process.stdout.readexactly(_LENGTH.size))
        return pickle.loads(await process.stdout.readexactly(length))

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()  # it holds nothing
            await process.wait()

    def _stay(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def _leave_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._idle = loop.call_later(self._idle_seconds, self._leave)

    def _leave(self) -> None:
        # Nobody has its turn: whoever takes it calls _stay first. Its end of file ends it.
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            process.stdin.close()


def _facts(model: ServedModel) -> _Facts:
    return _Facts(
        model.spec.path,
        model.spec.plan,
        model.context_length,
        model.aliases,
        dict(model.adapters),
        dict(model.presets),
        model.special_in_text,
    )


class _House:
    """The models, opened when first asked for; on the far side of the pipe."""

    def __init__(self) -> None:
        self._models: dict[str, ServedModel] = {}

    def now(self, facts: Mapping[str, _Facts]) -> dict[str, ServedModel]:
        for name, fact in facts.items():
            if name not in self._models:
                self._models[name] = open_served_model(name, Path(fact.path), fact.plan)
            model = self._models[name]
            model.context_length = fact.context_length
            model.aliases, model.adapters = fact.aliases, fact.adapters
            model.presets, model.special_in_text = fact.presets, fact.special_in_text
        return self._models


def _serve(read: BinaryIO, write: BinaryIO) -> None:
    house = _House()
    while len(head := read.read(_LENGTH.size)) == _LENGTH.size:
        (length,) = _LENGTH.unpack(head)
        job: _Job = pickle.loads(read.read(length))
        answer: object
        try:
            answer = prepare(job.kind, job.body, house.now(job.models), job.view)
        except ApiError as error:
            answer = error
        data = pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)
        write.write(_LENGTH.pack(len(data)) + data)
        write.flush()


def main() -> None:
    if "behind-others" in sys.argv and hasattr(os, "nice"):
        os.nice(_LOWERED)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too, and its owner decides
    write = os.fdopen(os.dup(1), "wb")
    log_to_stderr()
    os.dup2(2, 1)  # what a library prints is no answer
    with contextlib.suppress(BrokenPipeError):
        _serve(sys.stdin.buffer, write)


if __name__ == "__main__":
    main()
