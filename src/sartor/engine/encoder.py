"""The step loop of models that make vectors of texts: whole sequences, no state, no sampling.

It has the face of :class:`sartor.engine.engine.Engine`, so that whoever turns engines (the
worker, the Python interface) need not know which one it has.
"""

from __future__ import annotations

import logging
import time
from collections import deque

import numpy as np

from sartor.backends.base import Executable
from sartor.engine.request import Chunk, Request
from sartor.engine.step import StepRecord
from sartor.errors import CapacityError, SartorError, UsageError
from sartor.graph import Batch, Ragged
from sartor.graph.batch import F32, SAMPLING_ROW
from sartor.models.config import VectorConfig
from sartor.models.vectors import token_weights

logger = logging.getLogger(__name__)
_RECORDS = 1024


class Encoder:
    """Runs requests on one executable, many short ones a step.

    A request ends with exactly one chunk: its ``embedding`` is the vector, or its
    ``finish_reason`` says why there is none.
    """

    def __init__(
        self, executable: Executable, vectors: VectorConfig, *, context_length: int, limit: str
    ) -> None:
        """``vectors`` says what becomes of the tokens, ``limit`` what states the longest text."""
        self.executable = executable
        self._vectors = vectors
        self._limit = limit
        self.records: deque[StepRecord] = deque(maxlen=_RECORDS)
        self.context_length = context_length
        """Longest text, in tokens."""
        plan = executable.plan
        # A sequence cannot be cut: the budget of a step holds the longest one.
        self._max_tokens = max(plan.max_batch_tokens, context_length)
        self._max_sequences = plan.max_sequences
        self._vocab = executable.program.vocab
        self._waiting: dict[str, Request] = {}
        self._outbox: list[Chunk] = []
        self._steps = 0

    def add(self, request: Request) -> None:
        """Queues a request.

        Errors: UsageError for a second request of the same id, for token ids outside the
        vocabulary and for what only makes sense where text is written; CapacityError for a
        text that is too long.
        """
        if request.id in self._waiting:
            raise UsageError(f"request {request.id}: the id is in use; give each request its own")
        if request.segments or request.adapter or request.params.n != 1:
            raise UsageError(
                f"request {request.id}: this model makes one vector of plain text; it takes no "
                "embeddings, no adapter and no n above 1"
            )
        if len(request.prompt) > self.context_length:
            raise CapacityError(
                f"the text has {len(request.prompt)} tokens, but this model reads at most "
                f"{self.context_length} ({self._limit}); shorten it"
            )
        if request.left_out >= len(request.prompt):
            raise UsageError(
                f"request {request.id}: all {len(request.prompt)} tokens are those of the prompt, "
                "which take no part in the vector; give a text"
            )
        wrong = [token for token in request.prompt if not 0 <= token < self._vocab]
        if wrong:
            raise UsageError(
                f"request {request.id}: prompt has token id {wrong[0]}; this model's ids go from 0 "
                f"to {self._vocab - 1}"
            )
        self._waiting[request.id] = request

    def abort(self, request_id: str) -> None:
        """Ends a request at once; an unknown id is one that has just ended."""
        request = self._waiting.pop(request_id, None)
        if request is not None:
            self._outbox.append(_chunk(request, "abort"))

    def reset(self) -> None:
        """Aborts everything."""
        for request_id in list(self._waiting):
            self.abort(request_id)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._outbox)

    @property
    def running(self) -> int:
        return 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def step(self) -> list[Chunk]:
        """Encodes the next requests, in order of priority and arrival."""
        chunks, self._outbox = self._outbox, []
        started = time.perf_counter()
        requests = self._next()
        if not requests:
            return chunks
        scheduled = built = executed = time.perf_counter()
        try:
            batch = text_batch([request.prompt for request in requests], self._weights(requests))
            built = executed = time.perf_counter()
            vectors = self.executable.collect(self.executable.submit(batch)).embeddings
            executed = time.perf_counter()
            chunks += [
                _chunk(request, "stop", vector)
                for request, vector in zip(requests, vectors, strict=True)
            ]
        except Exception as error:
            logger.exception("a step of %d texts failed", len(requests))
            known = isinstance(error, SartorError)
            message = str(error) if known else f"{type(error).__name__}: {error}"
            chunks += [_chunk(request, "error", error=message) for request in requests]
        for request in requests:
            del self._waiting[request.id]
        self._record(requests, (started, scheduled, built, executed))
        return chunks

    def _weights(self, requests: list[Request]) -> F32 | None:
        """What the tokens of each text are multiplied by, where the program wants that."""
        if not self._vectors.weighted:
            return None
        return np.concatenate(
            [token_weights(self._vectors, len(one.prompt), one.left_out) for one in requests]
        )

    def _record(self, requests: list[Request], times: tuple[float, float, float, float]) -> None:
        started, scheduled, built, executed = times
        ended = time.perf_counter()
        self.records.append(
            StepRecord(
                index=self._steps,
                started=started,
                prompt_tokens=sum(len(request.prompt) for request in requests),
                decode_tokens=0,
                output_tokens=0,
                sequences=len(requests),
                preempted=0,
                running=0,
                waiting=len(self._waiting),
                blocks_held=(),
                blocks_cached=(),
                blocks_total=(),
                schedule_seconds=scheduled - started,
                build_seconds=built - scheduled,
                execute_seconds=executed - built,
                post_seconds=ended - executed,
                seconds=ended - started,
            )
        )
        self._steps += 1

    def _next(self) -> list[Request]:
        chosen: list[Request] = []
        budget = self._max_tokens
        for request in sorted(self._waiting.values(), key=lambda r: -r.priority):
            budget -= len(request.prompt)
            if budget < 0 or len(chosen) == self._max_sequences:
                break
            chosen.append(request)
        return chosen


def _chunk(
    request: Request, reason: str, vector: F32 | None = None, error: str | None = None
) -> Chunk:
    return Chunk(
        request_id=request.id,
        choice=0,
        text="",
        tokens=(),
        logprobs=(),
        finish_reason=reason,  # type: ignore[arg-type]
        error=error,
        prompt_tokens=len(request.prompt),
        completion_tokens=0,
        cached_tokens=0,
        embedding=b"" if vector is None else vector.astype("<f4").tobytes(),
    )


def text_batch(prompts: list[tuple[int, ...]], weights: F32 | None = None) -> Batch:
    """A step over whole texts; ``weights`` ``[tokens, poolings]`` where the program wants them."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    nothing = Ragged(np.zeros(0, np.int32), np.zeros(1, np.int32))
    return Batch(
        tokens=np.concatenate([np.array(prompt, np.int32) for prompt in prompts]),
        positions=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        starts=starts,
        contexts=np.zeros(len(prompts), np.int32),
        block_tables=(),
        rope_lengths=lengths,
        output_rows=np.zeros(0, np.int32),
        sampling=np.zeros(0, SAMPLING_ROW),
        history=nothing,
        bias_tokens=nothing,
        bias_values=Ragged(np.zeros(0, np.float32), nothing.starts),
        embedding_rows=np.arange(0 if weights is None else len(weights), dtype=np.int32),
        embeddings=np.zeros((0, 0), np.float32) if weights is None else weights,
    )
