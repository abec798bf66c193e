"""The step loop: schedule, build, run, detokenise; one step at a time, one thread."""

from __future__ import annotations

import logging
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from collections.abc import Sequence as List
from operator import attrgetter

from sartor.backends.base import Executable
from sartor.engine.adapter import AdapterTable
from sartor.engine.batch_builder import BatchBuilder
from sartor.engine.cache import Prefix, StateCache
from sartor.engine.embedding import EmbeddedRows
from sartor.engine.output import OutputStream
from sartor.engine.pace import Pace
from sartor.engine.request import Chunk, FinishReason, Request, TokenLogprob
from sartor.engine.scheduler import UNBOUNDED, Limits, Schedule, decide
from sartor.engine.sequence import Sequence
from sartor.engine.sizing import least_blocks, most_blocks
from sartor.engine.step import Flight, StepRecord
from sartor.engine.waiting import WaitingQueue
from sartor.errors import CapacityError, SartorError, UsageError
from sartor.graph import Capabilities, LowRank
from sartor.graph.batch import StepOutput
from sartor.ops.rope import inverse_frequencies
from sartor.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
_key = attrgetter("key")
_RECORDS = 1024
_HELD = Prefix((), 0, (), hold=True)


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
        capabilities: Capabilities,
        context_length: int,
        model_key: str,
        state_blocks: List[int],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Allocates ``state_blocks[g]`` blocks for each state group g.

        ``capabilities`` are those of the executable's backend on its device; ``model_key`` names
        model and revision: part of the key under which prefixes are shared. ``clock`` gives the
        seconds by which steps are timed.
        """
        plan = executable.plan
        program = executable.program
        self.executable = executable
        self.tokenizer = tokenizer
        self.records: deque[StepRecord] = deque(maxlen=_RECORDS)
        self._vocab = program.vocab
        self._root = (model_key, plan.numerics())
        vectors = program.inputs.get("embeddings")
        width = 0 if vectors is None else program.values[vectors].shape[1]
        assert isinstance(width, int)
        self._embedding_width = width
        self._ropes_by_length = [rope for rope in program.ropes if rope.depends_on_length]
        groups = program.groups()
        block_size = plan.block_size
        for group, blocks in zip(groups, state_blocks, strict=True):
            least = least_blocks(group, block_size)
            if blocks < least:
                raise CapacityError(
                    f"{blocks} state blocks of {block_size} tokens are too few for this model "
                    f"(at least {least} needed)",
                    advice=("raise {}", ("state_bytes",)),
                )
            if not group.window:
                context_length = min(context_length, blocks * block_size)
        self.context_length = context_length
        """Longest prompt + output, in tokens: the model's or the plan's, or what state holds."""
        self._pipelined = capabilities.asynchronous
        self._steps_at_once = 2 if self._pipelined else 1
        self._limits = Limits(
            max_batch_tokens=plan.max_batch_tokens,
            # Every running sequence can decode in every step.
            max_sequences=min(plan.max_sequences, plan.max_batch_tokens),
            block_size=block_size,
            group_caps=tuple(
                most_blocks(group, block_size, plan.max_batch_tokens, self._steps_at_once)
                or UNBOUNDED
                for group in groups
            ),
            step_caps=tuple(1 if group.kind == "recurrent" else UNBOUNDED for group in groups),
            aligned=plan.prefix_cache and any(group.kind == "recurrent" for group in groups),
            row_tile=capabilities.row_tile,
        )
        self._groups = groups
        self._blocks = tuple(state_blocks)
        self._prefix_cache = plan.prefix_cache
        # A recurrent state is kept where a step ends, so after the last token of a prompt; the
        # other choices have to compute that token themselves.
        self._forks = capabilities.copies and all(group.kind == "paged" for group in groups)
        self._adapters = AdapterTable(executable, capabilities.adapters)
        self._arrivals = 0
        self._steps = 0
        self._last_end = 0.0
        self._clock = clock
        self._pace = Pace()
        self._sequences: dict[str, list[Sequence]] = {}
        self._waiting: WaitingQueue[Sequence] = WaitingQueue()
        self._running: list[Sequence] = []
        self._outbox: list[Chunk] = []
        executable.allocate_state(state_blocks)
        self._flight: Flight | None = None
        self._cache, self._builders = self._fresh_cache()

    def _fresh_cache(self) -> tuple[StateCache, list[BatchBuilder]]:
        limits = self._limits
        cache = StateCache(
            self._groups,
            self._blocks,
            block_size=limits.block_size,
            max_sequences=limits.max_sequences,
            max_context=self.context_length,
            prefix_cache=self._prefix_cache,
        )
        builders = [
            BatchBuilder(cache, self._groups, limits.max_batch_tokens, self.context_length)
            for _ in range(self._steps_at_once)
        ]
        return cache, builders

    # Requests -------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queues a request.

        Errors: UsageError for a second request of the same id, for token ids outside the
        vocabulary, for an adapter that is not loaded, and for vectors that do not fit;
        CapacityError for a prompt that leaves no room for an answer.
        """
        if request.id in self._sequences:
            raise UsageError(f"request {request.id}: the id is in use; give each request its own")
        self._check_ids(request)
        embedded = None
        if request.segments:
            embedded = EmbeddedRows(
                request.id, request.segments, len(request.prompt), self._embedding_width
            )
        adapter = self._adapters.find(request.adapter, request.id) if request.adapter else None
        params = request.params
        room = self.context_length - len(request.prompt)
        if room < 1:
            raise CapacityError(
                f"the prompt has {len(request.prompt)} tokens, but prompt and answer together can "
                f"have {self.context_length}; shorten the prompt"
            )
        limit = len(request.prompt) + min(room, params.max_tokens or room)
        root: Hashable = (
            *self._root,
            request.salt,
            0 if adapter is None else adapter.generation,
            # Equal frequencies, equal state: long requests share with others that count as long.
            tuple(inverse_frequencies(r, limit).tobytes() for r in self._ropes_by_length),
        )
        sequences = []
        for choice in range(params.n):
            stream = OutputStream(request, choice, self.tokenizer, limit)
            if stream.finish_reason is not None:  # a replay of what had ended already
                self._outbox.append(stream.end(stream.finish_reason))
                continue
            sequences.append(
                Sequence(request, stream, self._arrivals, limit, root, embedded, adapter)
            )
            self._arrivals += 1
        for sequence in sequences:
            self._waiting.arrive(sequence.tenant)
            self._waiting.add(sequence)
            if adapter is not None:
                self._adapters.acquire(adapter)
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
            for sequence in sequences:
                self._outbox.append(sequence.stream.end("abort"))
                if sequence.adapter is not None:
                    self._adapters.release(sequence.adapter)
        self._sequences, self._waiting, self._running = {}, WaitingQueue(), []
        if self._flight is not None:
            flight, self._flight = self._flight, None
            try:
                self.executable.collect(flight.handle)
            except Exception as error:  # nobody waits for it any more
                logger.warning("a step failed after its requests had been aborted: %s", error)
        self._cache, self._builders = self._fresh_cache()

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._outbox or self._flight)

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

    def blocks_cached(self) -> tuple[int, ...]:
        """State blocks of each group that nobody holds, kept for prompts to come."""
        return tuple(pool.cached for pool in self._cache.pools)

    @property
    def blocks_total(self) -> tuple[int, ...]:
        return self._blocks

    def check(self) -> None:
        """Asserts that queues, tables, pools and prefix tree agree. For tests."""
        self._cache.check(self._running)
        waiting = list(self._waiting)
        queued = sorted(s.order for s in self._running + waiting)
        assert queued == sorted(s.order for group in self._sequences.values() for s in group)
        assert self._running == sorted(self._running, key=_key)
        assert len(waiting) == len(self._waiting)
        assert all(s.computed <= s.length < s.limit for s in self._running)
        flying = set() if self._flight is None else {s.order for s in self._flight.outputs}
        for s in self._running:
            # A token is to come, or something is left to compute: nobody is forgotten.
            assert s.order in flying or s.computed < s.length
            assert s.order in flying or (s.tokens >= 0).all()
        assert all(s.computed == 0 and s.slot < 0 for s in waiting)

    # Adapters -------------------------------------------------------------------------

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of adapters that requests may ask for."""
        return self._adapters.names

    def load_adapter(self, name: str, layers: Mapping[str, LowRank]) -> None:
        """Makes a low-rank adapter available; ``layers`` by the weight that each adapts.

        Errors: UnsupportedError where the backend has no adapters, UsageError for a name in use
        and for layers that do not fit the model.
        """
        self._adapters.load(name, layers)

    def drop_adapter(self, name: str) -> None:
        """Refuses an adapter to new requests from now on. Those that have it go on to their end,
        and then it is freed. UsageError for an unknown name."""
        self._adapters.drop(name)

    # The step -------------------------------------------------------------------------

    def step(self) -> list[Chunk]:
        """Runs one step and returns its chunks; ``[]`` when idle.

        Where a step fails, its requests end with finish_reason "error"; others go on.

        On an asynchronous backend a call submits one step and then collects the one before it,
        so the chip always has something to do; the chunks are those of the step collected.
        Tokens not known yet are named by the output row that they will come from. A sequence
        that turns out to have ended (or was aborted) then has a surplus row in the step in
        flight, which is dropped. Its blocks may be handed out already, and that is sound: they
        are written by later steps only, steps run in order, and what the surplus row itself
        writes lies behind the end of every block that the prefix tree keeps.
        """
        chunks, self._outbox = self._outbox, []
        flight = self._launch(chunks)
        if self._pipelined:
            flight, self._flight = self._flight, flight
        if flight is not None:
            self._land(flight, chunks)
        return chunks

    def _launch(self, chunks: list[Chunk]) -> Flight | None:
        """Schedules, builds and submits a step; None when there is nothing to do now."""
        started = self._clock()
        schedule, preempted = self._schedule(chunks)
        items = schedule.items
        if not items:
            return None
        scheduled = self._clock()
        try:
            # The batch in flight keeps its buffers.
            self._builders.reverse()
            batch, outputs = self._builders[0].build(items)
            built = self._clock()
            handle = self.executable.submit(batch)
        except Exception as error:
            self._fail(items, error, chunks)
            return None
        positions = [sequence.length for sequence in outputs]
        for sequence, tokens in items:
            sequence.computed += tokens
        if self._pipelined:
            for row, sequence in enumerate(outputs):
                sequence.expect(row)
        times = (started, scheduled, built, self._clock())
        ends = [sequence.computed for sequence, _ in items]
        return Flight(handle, items, ends, outputs, positions, preempted, times)

    def _land(self, flight: Flight, chunks: list[Chunk]) -> None:
        """Collects a step, books what it computed, and makes the chunks of its tokens."""
        called = self._clock()
        try:
            step = self.executable.collect(flight.handle)
            executed = self._clock()
            for (sequence, tokens), end in zip(flight.items, flight.ends, strict=True):
                if sequence.slot >= 0:  # else it has ended since
                    self._cache.commit(sequence, end)
                    one = tokens == 1
                    self._waiting.charge(sequence.tenant, sequence.share, tokens - one, one)
            rows = zip(flight.outputs, flight.positions, step.tokens.tolist(), strict=True)
            for row, (sequence, position, token) in enumerate(rows):
                if sequence.slot >= 0:
                    self._take(sequence, position, token, step, row, chunks)
        except Exception as error:
            self._fail(flight.items, error, chunks)
            return
        self._record(flight, executed - called, executed)

    def _take(
        self,
        sequence: Sequence,
        position: int,
        token: int,
        step: StepOutput,
        row: int,
        chunks: list[Chunk],
    ) -> None:
        """One new token of one sequence."""
        stream = sequence.stream
        logprob = None
        if sequence.request.params.logprobs is not None:
            logprob = _logprob(stream, step, row, token)
        sequence.put(position, token)
        chunks.append(stream.push(token, logprob))
        if stream.finish_reason is not None:
            self._remove(sequence)

    def _schedule(self, chunks: list[Chunk]) -> tuple[Schedule[Sequence, Prefix], int]:
        preempted = 0
        while True:
            schedule = decide(
                self._running,
                self._waiting,
                self._cache.available(),
                self._limits,
                self._prefix,
                self._pace.budget,
            )
            if schedule.preempt is None:
                break
            if self._flight is not None:
                # It may free blocks and end sequences; and none is preempted with a token
                # in flight.
                flight, self._flight = self._flight, None
                self._land(flight, chunks)
                continue
            preempted += 1
            self._running.remove(schedule.preempt)
            self._cache.release(schedule.preempt)
            self._waiting.add(schedule.preempt)
        # Prefixes first: a new block must not evict one that was counted on.
        for sequence, prefix in schedule.admitted:
            self._waiting.remove(sequence)
            self._cache.admit(sequence, prefix)
            insort(self._running, sequence, key=_key)
            for builder in self._builders:
                builder.admit(sequence)
            sequence.stream.admit(min(prefix.tokens, len(sequence.request.prompt)))
        for sequence, tokens in schedule.items:
            if sequence.computed + tokens > sequence.end * self._limits.block_size:
                self._cache.extend(sequence, sequence.computed + tokens)
        return schedule, preempted

    def _prefix(self, sequence: Sequence, admitted: List[Sequence]) -> Prefix:
        """What a waiting sequence can reuse; it waits where another computes more of it."""
        block_size = self._limits.block_size
        if sequence.waits_for is not None:
            other, stop = sequence.waits_for
            if other.slot >= 0 and other.shared * block_size < stop:
                return _HELD  # nothing has changed
            sequence.waits_for = None
        prefix = self._cache.match(sequence)
        stop = prefix.tokens + block_size
        if self._prefix_cache and stop < sequence.length:
            for other in (*self._running, *admitted):
                if (
                    other.shared * block_size < stop <= other.length
                    and other.root == sequence.root
                    and sequence.begins_like(other, stop, block_size)
                ):
                    sequence.waits_for = other, stop
                    return _HELD
        if self._forks and sequence.request.params.n > 1:
            return self._fork(sequence, admitted, prefix)
        return prefix

    def _fork(self, sequence: Sequence, admitted: List[Sequence], prefix: Prefix) -> Prefix:
        """What a choice can reuse of others of its request: their prompt, which it waits for while
        one is computing it, but for the last token, whose logits it draws its first token from.
        """
        request = sequence.request
        tokens = min(len(request.prompt), sequence.length - 1)
        if tokens <= prefix.tokens:
            return prefix
        computing = any(other.request is request for other in admitted)
        for other in self._sequences[request.id]:
            if other.slot < 0:
                continue
            if other.computed < tokens:
                computing = True
                continue
            fork = self._cache.fork(prefix, other, tokens)
            if fork is not None:
                return fork
        return _HELD if computing else prefix

    def _fail(
        self, items: List[tuple[Sequence, int]], error: Exception, chunks: list[Chunk]
    ) -> None:
        """Ends the requests of a step that raised ``error``."""
        logger.error("a step of %d sequences failed", len(items), exc_info=error)
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
        self._waiting.leave(sequence.tenant)
        self._cache.release(sequence)
        if sequence.adapter is not None:
            self._adapters.release(sequence.adapter)
        siblings = self._sequences[sequence.request.id]
        siblings.remove(sequence)
        if not siblings:
            del self._sequences[sequence.request.id]

    def _record(self, flight: Flight, collect_seconds: float, executed: float) -> None:
        tokens = sum(count for _, count in flight.items)
        singles = sum(count == 1 for _, count in flight.items)
        started, scheduled, built, submitted = flight.times
        ended = self._clock()
        # Where steps overlap, a step takes the time since the one before it.
        seconds = ended - max(started, self._last_end)
        self._last_end = ended
        self._pace.learn(singles, tokens - singles, seconds)
        self.records.append(
            StepRecord(
                index=self._steps,
                started=started,
                prompt_tokens=tokens - singles,
                decode_tokens=singles,
                output_tokens=len(flight.outputs),
                sequences=len(flight.items),
                preempted=flight.preempted,
                running=len(self._running),
                waiting=len(self._waiting),
                blocks_held=self.blocks_held(),
                blocks_cached=self.blocks_cached(),
                blocks_total=self._blocks,
                schedule_seconds=scheduled - started,
                build_seconds=built - scheduled,
                execute_seconds=submitted - built + collect_seconds,
                post_seconds=ended - executed,
                seconds=seconds,
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
