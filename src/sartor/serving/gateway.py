"""The gateway: hands requests to workers, chunks to readers, and brings both past a crash.

It knows each unfinished request and the tokens already sent, so a worker that dies takes
nothing with it: the next one goes on from there, and the reader notices a pause at most.
All methods run on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from sartor.engine.request import Request
from sartor.serving.adapters import Adapters
from sartor.serving.answer import Answer
from sartor.serving.books import Books
from sartor.serving.errors import (
    ApiError,
    answers_full,
    given_up,
    holds_its_part,
    internal,
    invalid,
    overloaded,
    too_long_a_queue,
    unavailable,
)
from sartor.serving.frontend import ServedModel
from sartor.serving.inflight import InFlight, Ledger
from sartor.serving.lifecycle import Death, Phase, Timing
from sartor.serving.limits import ServerLimits
from sartor.serving.messages import (
    Abort,
    AdapterLoaded,
    Chunks,
    EngineStats,
    HostedModel,
    Ready,
    Refused,
    Submit,
)
from sartor.serving.quarantine import Quarantine
from sartor.serving.shares import Room, everything
from sartor.serving.shown_paths import without_folders
from sartor.serving.supervisor import Supervisor
from sartor.serving.waits import Waits

logger = logging.getLogger(__name__)


class Gateway:
    """Unfinished requests, and the worker that answers them.

    ``max_requests`` prompts may be unfinished at once, and none is taken that would wait for its
    first token longer than ``max_wait`` seconds (0: however long): others are turned away (429).
    Clients may load adapters that lie in ``adapter_folder``. ``memory_bytes`` is what the worker
    may take in all; None: no limit. Answers that wait to be taken may hold ``answers_bytes``; where
    they would hold more, the largest of the key that has most is given up. ``part`` is how much of
    the prompts one key may have.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        *,
        timing: Timing | None = None,
        max_requests: int = 1024,
        max_wait: float = 0.0,
        adapter_folder: Path | None = None,
        memory_bytes: int | None = None,
        answers_bytes: int = ServerLimits.answers_bytes,
        part: Callable[[], float] = everything,
    ) -> None:
        self.answers = Room(answers_bytes)
        """Bytes of answers, or parts of them, that nobody has taken yet."""
        self._part = part
        self.memory_bytes = memory_bytes
        self.models = {model.name: model for model in models}
        self.timing = timing or Timing()
        self.draining = False
        self._max_requests = max_requests
        self._max_wait = max_wait
        self._waits = Waits()
        self.books = Books(self.models)
        self._ledger = Ledger()
        self._quarantine = Quarantine(self.timing.quarantine)
        self._answers: dict[str, Answer] = {}
        self._broken: dict[str, str] = {}
        self.hosted: dict[str, HostedModel] = {}
        self._settled = asyncio.Event()
        self._supervisor = Supervisor(
            [model.hosted() for model in models],
            self.timing,
            self,
            memory_bytes,
        )
        self.adapters = Adapters(self.models, self._supervisor, adapter_folder)

    @property
    def phase(self) -> Phase:
        return self._supervisor.phase

    @property
    def worker_pid(self) -> int | None:
        return self._supervisor.pid

    @property
    def worker_silence(self) -> float | None:
        """Seconds since the worker's last sign of life; None while it is not ready."""
        return self._supervisor.silence

    @property
    def unfinished(self) -> int:
        return len(self._ledger)

    def unfinished_by_key(self) -> Counter[str]:
        """How many prompts of each key are unfinished."""
        return self._ledger.tenants()

    def start(self) -> None:
        """Starts the worker; needs a running event loop."""
        self._supervisor.start()

    async def settled(self) -> None:
        """Waits until the worker is ready for the first time, or given up."""
        await self._settled.wait()

    async def close(self) -> None:
        """Answers whoever still waits with an error and ends the worker."""
        self.draining = True
        for entry in self._ledger.clear():
            self._fail(entry.request.id, unavailable("the server is shutting down"))
        await self._supervisor.close()

    def drop_adapter(self, name: str) -> None:
        """Raises ApiError 404 for an unknown one."""
        self.adapters.drop(name, in_use=self._ledger.uses(name))

    def problem(self, model: str) -> str | None:
        """Why a model cannot answer, as clients may see it, or None."""
        if self._supervisor.phase == "failed":
            return f"the worker could not be started: {self._told(self._supervisor.cause)}"
        if model in self._broken:
            return f"it could not be loaded: {self._told(self._broken[model])}"
        return None

    def failure(self) -> str:
        """What keeps any model or adapter of the last worker from answering, in one line, as
        whoever runs the server may see it; empty where nothing does."""
        if self._supervisor.phase == "failed":
            return self._supervisor.cause
        problems = [f"the model {name}: {error}" for name, error in self._broken.items()]
        for model in self.hosted.values():
            problems += [f"the adapter {a}: {error}" for a, error in model.adapter_errors.items()]
        return "; ".join(problems)

    def submit(self, model: str, requests: Sequence[Request]) -> Answer:
        """Takes the prompts of one HTTP request.

        Raises ApiError 429 or 503, and 500 for one that was given up a short while ago.
        """
        self._supervisor.ensure_ready()
        if self.draining:
            raise unavailable("the server is shutting down", retry_after=5)
        if problem := self.problem(model):
            raise unavailable(
                f"the model {model} is not available: {problem}", self._supervisor.retry_seconds
            )
        tenant = requests[0].tenant
        most = max(1, int(self._max_requests * self._part()))
        if len(requests) > most:
            whose = "" if most == self._max_requests else " of one key"
            raise invalid(
                f"prompt: {len(requests)} prompts, but the server takes {most} "
                f"unfinished ones{whose} in all; send fewer at once",
                "prompt",
            )
        if len(self._ledger) + len(requests) > self._max_requests:
            raise overloaded(self._max_requests)
        if most < self._max_requests and self._ledger.tenants()[tenant] + len(requests) > most:
            raise holds_its_part(tenant, f"{most} of {self._max_requests} unfinished prompts")
        for request in requests:
            if left := self._quarantine.left(model, request):
                raise given_up(
                    "this very request was given up a short while ago, because workers died of "
                    f"it; change it, or send it again after {left:.0f} s"
                )
        now = time.monotonic()
        if self._max_wait and (wait := self._waits.seconds(now, tenant)) > self._max_wait:
            raise too_long_a_queue(wait, self._max_wait)
        answer = Answer(requests, functools.partial(self.abort, model), self._weigh)
        for request in requests:
            self._waits.arrived(request.id, now, tenant)
            self._answers[request.id] = answer
            self._ledger.add(InFlight(model, request))
        self._dispatch()
        return answer

    def abort(self, model: str, request_id: str) -> None:
        """Nobody wants the answer any more."""
        if self._answers.pop(request_id, None) is None:
            return
        if self._remove(request_id):
            self._supervisor.send(Abort(model, request_id))
        self._dispatch()

    def _weigh(self, answer: Answer, more: int) -> None:
        """An answer holds more bytes, or fewer."""
        self.answers.take(answer.tenant, more)
        if more < 0 or self.answers.held <= self.answers.limit:
            return
        held = self.answers.keys()
        whose = max(held, key=held.__getitem__)
        theirs = [other for other in self._answers.values() if other.tenant == whose]
        if theirs:
            largest = max(theirs, key=lambda other: other.held)
            largest.give_up(answers_full(largest.held, self.answers.limit))

    # From the supervisor

    def worker_ready(self, message: Ready) -> None:
        models = message.models
        self.hosted = {model.name: model for model in models}
        self.books.process_bytes = message.process_bytes
        self._broken = {model.name: model.error for model in models if model.error is not None}
        at_start = not self._settled.is_set()  # then it is for whoever started the server to tell
        for model in models:
            if model.error is None:
                self.models[model.name].limit_context(model.context_length)
                for name, error in model.adapter_errors.items():
                    if not at_start:
                        logger.error(
                            "adapter %s of %s is not available: %s", name, model.name, error
                        )
                    self.models[model.name].adapters.pop(name, None)
                continue
            if not at_start:
                logger.error("the model %s is not available: %s", model.name, model.error)
            for entry in self._ledger.drop_model(model.name):
                self._fail(
                    entry.request.id,
                    unavailable(
                        f"the model {model.name} could not be loaded: {self._told(model.error)}"
                    ),
                )
        self._settled.set()
        self._dispatch()

    def worker_chunks(self, message: Chunks) -> None:
        self.books.chunks(message.chunks)
        now = time.monotonic()
        pushed: dict[Answer, None] = {}
        for chunk in message.chunks:
            self._waits.began(chunk.request_id, now)
            entry, answer = self._ledger.get(chunk.request_id), self._answers.get(chunk.request_id)
            if entry is None or answer is None:
                continue
            if chunk.finish_reason in ("error", "abort"):
                if entry.suspect:  # the step failed for it alone: workers died of it before
                    self._quarantine.add(entry.model, entry.request)
                    self._ledger.absolve()
                what = chunk.error or "the engine gave the request up"
                answer.fail(internal(self._told(what)))
            elif entry.record(chunk):
                answer.push(chunk, entry.done)
                pushed[answer] = None
                if entry.done:
                    self._end(chunk.request_id)
        self._dispatch()
        for answer in pushed:
            answer.tell()

    def worker_refused(self, message: Refused) -> None:
        self._remove(message.request_id)
        error = invalid if message.invalid else internal
        self._fail(message.request_id, error(self._told(message.message)))
        self._dispatch()

    def adapter_loaded(self, message: AdapterLoaded) -> None:
        self.adapters.loaded(message)

    def engine_stats(self, message: EngineStats) -> None:
        self.books.engine_stats(message)

    def worker_died(self, cause: str, death: Death) -> None:
        self.books.worker_died(death)
        self.adapters.worker_died()
        for entry in self._ledger.crash(outside=death == "signal"):
            self._quarantine.add(entry.model, entry.request)
            self._release_adapter(entry.request.adapter)
            self._fail(
                entry.request.id,
                given_up(
                    "the request was given up, because the worker died twice while it ran this "
                    f"request alone ({self._told(cause)}); change the request, or report it"
                ),
            )

    def worker_failed(self, cause: str) -> None:
        for entry in self._ledger.clear():
            self._fail(
                entry.request.id,
                unavailable(
                    f"the model {entry.model} is not available: the worker could not be started: "
                    f"{self._told(cause)}",
                    self._supervisor.retry_seconds,
                ),
            )
        self._settled.set()

    def _told(self, text: str) -> str:
        """What a worker says, as clients may see it. The log has it as it is."""
        return without_folders(text, self.adapters.paths())

    def _dispatch(self) -> None:
        if self._supervisor.phase != "ready":
            return
        for entry in self._ledger.take():
            self._supervisor.send(Submit(entry.model, entry.replay()))

    def _end(self, request_id: str) -> None:
        self._remove(request_id)
        self._answers.pop(request_id, None)

    def _remove(self, request_id: str) -> bool:
        """Forgets a request; True when a worker has it."""
        self._waits.ended(request_id, time.monotonic())
        entry = self._ledger.get(request_id)
        running = self._ledger.remove(request_id)
        if entry is not None:
            self._release_adapter(entry.request.adapter)
        return running

    def _release_adapter(self, name: str) -> None:
        """One request less runs with an adapter ("" for none)."""
        if name and not self._ledger.uses(name):
            self.adapters.unused(name)

    def _fail(self, request_id: str, error: ApiError) -> None:
        self._waits.ended(request_id, time.monotonic())
        answer = self._answers.pop(request_id, None)
        if answer is not None:
            answer.fail(error)
