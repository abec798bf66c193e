"""What runs in the next step: a pure decision over what is waiting, running and free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

UNBOUNDED = 1 << 60


class Runnable(Protocol):
    """What the scheduler reads of a sequence."""

    @property
    def length(self) -> int:
        """Tokens known."""

    @property
    def computed(self) -> int:
        """Tokens whose state is there; ``length`` where the next token is still to come."""

    @property
    def end(self) -> int:
        """State blocks held or passed, from the start of the sequence."""

    @property
    def priority(self) -> int: ...


class Reusable(Protocol):
    """What the scheduler reads of a waiting sequence's cached prefix (`cache.Prefix`)."""

    @property
    def tokens(self) -> int: ...

    @property
    def cost(self) -> tuple[int, ...]: ...

    @property
    def hold(self) -> bool: ...


S = TypeVar("S", bound=Runnable)
P = TypeVar("P", bound=Reusable)


@dataclass(frozen=True)
class Limits:
    """What a step may use.

    ``group_caps``: per state group, the most blocks that one sequence holds at once during
    its prompt (:data:`UNBOUNDED` without a window); ``step_caps``: the most that one step takes
    of it (:data:`UNBOUNDED` but in recurrent groups, which take one wherever a step ends).
    ``aligned`` ends the chunks of a prompt with a block where they can, and always before its
    last token: only there a recurrent state can be shared.
    """

    max_batch_tokens: int
    max_sequences: int
    block_size: int
    group_caps: tuple[int, ...]
    step_caps: tuple[int, ...]
    aligned: bool = False

    def take(self, free: Sequence[int], blocks: int) -> list[int]:
        """What is left of each group when a step goes on by ``blocks`` blocks."""
        return [left - min(blocks, cap) for left, cap in zip(free, self.step_caps, strict=True)]

    def reach(self, free: Sequence[int]) -> int:
        """How many blocks a step can go on by."""
        rooms = zip(free, self.step_caps, strict=True)
        return min((UNBOUNDED if left >= cap else left for left, cap in rooms), default=UNBOUNDED)

    def chunk(self, computed: int, length: int, most: int) -> int:
        """Tokens of the next chunk of a prompt: ``most``, or fewer to end with a block."""
        stop = min(computed + most, length)
        last = (length - 1) // self.block_size * self.block_size
        if self.aligned and computed < last:
            boundary = min(stop // self.block_size * self.block_size, last)
            stop = boundary if boundary > computed else stop
        return stop - computed


@dataclass(frozen=True)
class Schedule(Generic[S, P]):
    """The decision.

    ``items``: each sequence of the step with its number of tokens, decodes first; those
    ``admitted``, with the prefix that was counted on, are among them. Where ``preempt`` is set,
    that sequence has to give up its blocks and nothing else holds: decide again.
    """

    items: list[tuple[S, int]] = field(default_factory=list)
    admitted: list[tuple[S, P]] = field(default_factory=list)
    preempt: S | None = None


def decide(
    running: Sequence[S],
    waiting: Sequence[S],
    available: Sequence[int],
    limits: Limits,
    prefix: Callable[[S, Sequence[S]], P],
) -> Schedule[S, P]:
    """Chooses the sequences of the next step and the tokens of each.

    ``running`` and ``waiting`` come in order of priority, then arrival; ``available`` counts
    the free blocks of each group; ``prefix(sequence, admitted)`` looks up what a waiting
    sequence could reuse, given those admitted in this step.

    - Decodes go first, then prompts that have begun, then new ones, in order, each prompt by
      as large a chunk as the token budget leaves.
    - When blocks run out, the last in order gives way (the youngest of the lowest priority):
      the first in order always goes on, so everything ends.
    - A new prompt starts only if its blocks fit beside those that begun prompts still need,
      and one more for each running sequence. None overtakes it, except where it waits for
      another sequence to compute their common prefix.
    """
    block_size = limits.block_size
    free = list(available)
    budget = limits.max_batch_tokens
    schedule: Schedule[S, P] = Schedule()
    items = schedule.items
    begun: list[S] = []

    for sequence in running:
        computed = sequence.computed
        if sequence.length - computed > 1:
            begun.append(sequence)
        elif sequence.length > computed:
            if computed >= sequence.end * block_size:
                if limits.reach(free) < 1:
                    return Schedule(preempt=running[-1])
                free = limits.take(free, 1)
            items.append((sequence, 1))
    budget -= len(items)

    owed = [0] * len(free)
    room = free
    for sequence in begun:
        most = min(budget, (sequence.end + limits.reach(room)) * block_size - sequence.computed)
        tokens = limits.chunk(sequence.computed, sequence.length, most)
        if tokens <= 0 < budget and sequence is not running[-1]:
            return Schedule(preempt=running[-1])
        if tokens > 0:
            items.append((sequence, tokens))
            budget -= tokens
            blocks = _blocks(sequence.computed + tokens, block_size) - sequence.end
            room = limits.take(room, max(0, blocks))
        whole = max(0, _blocks(sequence.length, block_size) - sequence.end)
        for group, cap in enumerate(limits.group_caps):
            owed[group] += min(whole, cap)

    free = [left - debt for left, debt in zip(free, owed, strict=True)]
    admitted: list[S] = []
    for sequence in waiting:
        if budget <= 0:
            break
        active = len(running) + len(admitted)
        outranked = bool(running) and running[-1].priority < sequence.priority
        if active >= limits.max_sequences and not outranked:
            break
        found = prefix(sequence, admitted)
        if found.hold:
            continue
        whole = _blocks(sequence.length, block_size) - found.tokens // block_size
        after = [
            left - cost - min(whole, cap)
            for left, cost, cap in zip(free, found.cost, limits.group_caps, strict=True)
        ]
        if active >= limits.max_sequences or (active and min(after, default=active) < active):
            if outranked:
                return Schedule(preempt=running[-1])
            break
        most = budget
        if not active:
            # Alone it may fit only chunk by chunk, where groups have windows.
            room = [left - cost for left, cost in zip(free, found.cost, strict=True)]
            most = min(most, limits.reach(room) * block_size)
        tokens = limits.chunk(found.tokens, sequence.length, most)
        items.append((sequence, tokens))
        budget -= tokens
        free = after
        admitted.append(sequence)
        schedule.admitted.append((sequence, found))
    return schedule


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)
