"""The step loop: schedule, build, run, detokenise; one step at a time, one thread."""

from __future__ import annotations

import dataclasses
import logging
import time
from bisect import insort
from collections import deque
from collections.abc import Hashable
from collections.abc import Sequence as List
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from sartor.backends.base import Executable
from sartor.engine.batch_builder import BatchBuilder
from sartor.engine.cache import Prefix, StateCache
from sartor.engine.output import OutputStream
from sartor.engine.request import Chunk, FinishReason, Request, TokenLogprob
from sartor.engine.scheduler import UNBOUNDED, Limits, Schedule, decide
from sartor.engine.sequence import Sequence
from sartor.errors import CapacityError, SartorError, UsageError
from sartor.graph.batch import StepOutput
from sartor.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
_key = attrgetter("key")
_RECORDS = 1024


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did, and where its time went (seconds).

    ``blocks_held``, ``blocks_cached`` and ``blocks_total`` are per state group, after the step.
    ``decode_tokens`` counts sequences that computed a single token, ``prompt_tokens`` the tokens
    of larger chunks. ``waiting`` and ``running`` count sequences after it. Everything but
    ``execute_seconds`` is host work.
    """

    index: int
    started: float
    prompt_tokens: int
    decode_tokens: int
    output_tokens: int
    sequences: int
    preempted: int
    running: int
    waiting: int
    blocks_held: tuple[int, ...]
    blocks_cached: tuple[int, ...]
    blocks_total: tuple[int, ...]
    schedule_seconds: float
    build_seconds: float
    execute_seconds: float
    post_seconds: float

    @property
    def host_seconds(self) -> float:
        return self.schedule_seconds + self.build_seconds + self.post_seconds


class Engine:
    """Runs requests on one executable by continuous batching.

    Not thread-safe: whoever owns it calls :meth:`add` and :meth:`abort` between calls of
    :meth:`step`. Every request ends with exactly one chunk a choice that has a
    ``finish_reason``, whatever happens.
    """

    def __init__(
        self,
        executable: Executable,
        tokenizer: Tokenizer,
        *,
        context_length: int,
        model_key: str,
        state_blocks: List[int],
    ) -> None:
        """Allocates ``state_blocks[g]`` blocks for each state group g.

        ``model_key`` names model and revision: part of the key under which prefixes are shared.
        """
        plan = executable.plan
        program = executable.program
        self.executable = executable
        self.tokenizer = tokenizer
        self.records: deque[StepRecord] = deque(maxlen=_RECORDS)
        self._vocab = program.vocab
        self._root = (model_key, plan.numerics())
        self._rope_by_length = any(rope.depends_on_length for rope in program.ropes)
        windows = [group.window for group in program.groups()]
        block_size = plan.block_size
        for window, blocks in zip(windows, state_blocks, strict=True):
            least = -(-window // block_size) + 2
            if blocks < least:
                raise CapacityError(
                    f"{blocks} state blocks of {block_size} tokens are too few for this model "
                    f"(at least {least} needed); raise the plan's state_bytes"
                )
            if not window:
                context_length = min(context_length, blocks * block_size)
        self.context_length = context_length
        """Longest prompt + output, in tokens: the model's or the plan's, or what state holds."""
        chunk_blocks = -(-plan.max_batch_tokens // block_size)
        self._limits = Limits(
            max_batch_tokens=plan.max_batch_tokens,
            # Every running sequence can decode in every step.
            max_sequences=min(plan.max_sequences, plan.max_batch_tokens),
            block_size=block_size,
            group_caps=tuple(
                -(-window // block_size) + 1 + chunk_blocks if window else UNBOUNDED
                for window in windows
            ),
        )
        self._windows = windows
        self._blocks = tuple(state_blocks)
        self._prefix_cache = plan.prefix_cache
        self._arrivals = 0
        self._steps = 0
        self._sequences: dict[str, list[Sequence]] = {}
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._outbox: list[Chunk] = []
        executable.allocate_state(state_blocks)
        self._cache, self._builder = self._fresh_cache()

    def _fresh_cache(self) -> tuple[StateCache, BatchBuilder]:
        limits = self._limits
        cache = StateCache(
            self._windows,
            self._blocks,
            block_size=limits.block_size,
            max_sequences=limits.max_sequences,
            max_context=self.context_length,
            prefix_cache=self._prefix_cache,
        )
        return cache, BatchBuilder(cache, limits.max_batch_tokens, self.context_length)

    # Requests -------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queues a request.

        Errors: UsageError for a second request of the same id, and for token ids outside the
        vocabulary; CapacityError for a prompt that leaves no room for an answer.
        """
        if request.id in self._sequences:
            raise UsageError(f"request {request.id}: the id is in use; give each request its own")
        self._check_ids(request)
        params = request.params
        room = self.context_length - len(request.prompt)
        if room < 1:
            raise CapacityError(
                f"the prompt has {len(request.prompt)} tokens, but prompt and answer together can "
                f"have {self.context_length}; shorten the prompt"
            )
        limit = len(request.prompt) + min(room, params.max_tokens or room)
        root: Hashable = (*self._root, request.salt, limit if self._rope_by_length else 0)
        sequences = []
        for choice in range(params.n):
            stream = OutputStream(request, choice, self.tokenizer, limit)
            if stream.finish_reason is not None:  # a replay of what had ended already
                self._outbox.append(stream.end(stream.finish_reason))
                continue
            sequences.append(Sequence(request, stream, self._arrivals, limit, root))
            self._arrivals += 1
        for sequence in sequences:
            insort(self._waiting, sequence, key=_key)
        if sequences:
            self._sequences[request.id] = sequences

    def _check_ids(self, request: Request) -> None:
        for what, ids in (
            ("prompt", request.prompt),
            ("logit_bias", tuple(request.params.logit_bias)),
            *(("emitted", ids) for ids in request.emitted),
        ):
            if ids and not 0 <= min(ids) <= max(ids) < self._vocab:
                wrong = next(i for i in ids if not 0 <= i < self._vocab)
                raise UsageError(
                    f"request {request.id}: {what} has token id {wrong}; this model's ids go "
                    f"from 0 to {self._vocab - 1}"
                )

    def abort(self, request_id: str) -> None:
        """Ends a request at once; its last chunks come with the next step.

        An unknown id is one that has just ended: nothing happens.
        """
        for sequence in list(self._sequences.get(request_id, ())):
            self._outbox.append(self._end(sequence, "abort"))

    def reset(self) -> None:
        """Aborts everything and forgets the cache: sound wherever a step was interrupted."""
        for sequences in self._sequences.values():
            self._outbox.extend(s.stream.end("abort") for s in sequences)
        self._sequences, self._waiting, self._running = {}, [], []
        self._cache, self._builder = self._fresh_cache()

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._outbox)

    @property
    def running(self) -> int:
        """Sequences that hold state now."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def blocks_held(self) -> tuple[int, ...]:
        """State blocks of each group that running sequences hold."""
        return tuple(pool.total - pool.available for pool in self._cache.pools)

    def check(self) -> None:
        """Asserts that queues, tables, pools and prefix tree agree. For tests."""
        self._cache.check(self._running)
        queued = sorted(s.order for s in self._running + self._waiting)
        assert queued == sorted(s.order for group in self._sequences.values() for s in group)
        assert self._running == sorted(self._running, key=_key)
        assert self._waiting == sorted(self._waiting, key=_key)
        assert all(s.computed < s.length < s.limit for s in self._running)
        assert all(s.computed == 0 and s.slot < 0 for s in self._waiting)

    # The step -------------------------------------------------------------------------

    def step(self) -> list[Chunk]:
        """Runs one step and returns its chunks; ``[]`` when idle.

        Where a step fails, its requests end with finish_reason "error"; others go on.
        """
        started = time.perf_counter()
        chunks, self._outbox = self._outbox, []
        schedule, preempted = self._schedule()
        if not schedule.items:
            return chunks
        scheduled = time.perf_counter()
        try:
            batch, outputs = self._builder.build(schedule.items)
            built = time.perf_counter()
            step = self.executable.collect(self.executable.submit(batch))
            executed = time.perf_counter()
            self._advance(schedule.items, outputs, step, chunks)
        except Exception as error:
            logger.exception("a step of %d sequences failed", len(schedule.items))
            self._fail(schedule.items, error, chunks)
            return chunks
        self._record(
            schedule,
            preempted,
            len(outputs),
            (started, scheduled, built, executed, time.perf_counter()),
        )
        return chunks

    def _schedule(self) -> tuple[Schedule[Sequence, Prefix], int]:
        preempted = 0
        while True:
            schedule = decide(
                self._running, self._waiting, self._cache.available(), self._limits, self._prefix
            )
            if schedule.preempt is None:
                break
            preempted += 1
            self._running.remove(schedule.preempt)
            self._cache.release(schedule.preempt)
            insort(self._waiting, schedule.preempt, key=_key)
        # Prefixes first: a new block must not evict one that was counted on.
        for sequence, prefix in schedule.admitted:
            self._waiting.remove(sequence)
            self._cache.admit(sequence, prefix)
            insort(self._running, sequence, key=_key)
            self._builder.admit(sequence)
            if sequence.stream.cached_tokens is None:  # else it comes back from a preemption
                sequence.stream.cached_tokens = min(prefix.tokens, len(sequence.request.prompt))
        for sequence, tokens in schedule.items:
            if sequence.computed + tokens > sequence.end * self._limits.block_size:
                self._cache.extend(sequence, sequence.computed + tokens)
        return schedule, preempted

    def _prefix(self, sequence: Sequence, admitted: List[Sequence]) -> Prefix:
        """What a waiting sequence can reuse; it waits where another computes more of it."""
        prefix = self._cache.match(sequence)
        if not self._prefix_cache:
            return prefix
        stop = prefix.tokens + self._limits.block_size
        if stop >= sequence.length:
            return prefix
        tokens = sequence.tokens
        for other in (*self._running, *admitted):
            if (
                other.computed < stop <= other.length
                and other.root == sequence.root
                and np.array_equal(other.tokens[prefix.tokens : stop], tokens[prefix.tokens : stop])
                and np.array_equal(other.tokens[:stop], tokens[:stop])
            ):
                return dataclasses.replace(prefix, hold=True)
        return prefix

    def _advance(
        self,
        items: List[tuple[Sequence, int]],
        outputs: List[Sequence],
        step: StepOutput,
        chunks: list[Chunk],
    ) -> None:
        """Books what a step computed, and makes the chunks of its output tokens."""
        for sequence, tokens in items:
            sequence.computed += tokens
            self._cache.commit(sequence)
        for row, (sequence, token) in enumerate(zip(outputs, step.tokens.tolist(), strict=True)):
            stream = sequence.stream
            logprob = None
            if sequence.request.params.logprobs is not None:
                logprob = _logprob(stream, step, row, token)
            sequence.append(token)
            chunks.append(stream.push(token, logprob))
            if stream.finish_reason is not None:
                self._remove(sequence)

    def _fail(
        self, items: List[tuple[Sequence, int]], error: Exception, chunks: list[Chunk]
    ) -> None:
        message = (
            str(error) if isinstance(error, SartorError) else f"{type(error).__name__}: {error}"
        )
        for request_id in {s.request.id: None for s, _ in items}:
            for sequence in list(self._sequences.get(request_id, ())):
                chunks.append(self._end(sequence, "error", message))

    def _end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> Chunk:
        self._remove(sequence)
        return sequence.stream.end(reason, error)

    def _remove(self, sequence: Sequence) -> None:
        (self._waiting if sequence.slot < 0 else self._running).remove(sequence)
        self._cache.release(sequence)
        siblings = self._sequences[sequence.request.id]
        siblings.remove(sequence)
        if not siblings:
            del self._sequences[sequence.request.id]

    def _record(
        self,
        schedule: Schedule[Sequence, Prefix],
        preempted: int,
        outputs: int,
        times: tuple[float, float, float, float, float],
    ) -> None:
        tokens = sum(count for _, count in schedule.items)
        singles = sum(count == 1 for _, count in schedule.items)
        started, scheduled, built, executed, ended = times
        pools = self._cache.pools
        self.records.append(
            StepRecord(
                index=self._steps,
                started=started,
                prompt_tokens=tokens - singles,
                decode_tokens=singles,
                output_tokens=outputs,
                sequences=len(schedule.items),
                preempted=preempted,
                running=len(self._running),
                waiting=len(self._waiting),
                blocks_held=self.blocks_held(),
                blocks_cached=tuple(pool.cached for pool in pools),
                blocks_total=self._blocks,
                schedule_seconds=scheduled - started,
                build_seconds=built - scheduled,
                execute_seconds=executed - built,
                post_seconds=ended - executed,
            )
        )
        self._steps += 1


def _logprob(stream: OutputStream, step: StepOutput, row: int, token: int) -> TokenLogprob:
    span = slice(step.top_tokens.starts[row], step.top_tokens.starts[row + 1])
    top = tuple(
        stream.logprob(other, value, ())
        for other, value in zip(
            step.top_tokens.values[span].tolist(),
            step.top_logprobs.values[span].tolist(),
            strict=True,
        )
    )
    return stream.logprob(token, float(step.logprobs[row]), top)
