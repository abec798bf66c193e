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
        """Tokens whose state is there; below ``length``."""

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
    its prompt (:data:`UNBOUNDED` without a window).
    """

    max_batch_tokens: int
    max_sequences: int
    block_size: int
    group_caps: tuple[int, ...]


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
    room = min(free, default=UNBOUNDED)
    budget = limits.max_batch_tokens
    schedule: Schedule[S, P] = Schedule()
    items = schedule.items
    begun: list[S] = []
    taken = 0

    for sequence in running:
        computed = sequence.computed
        if sequence.length - computed > 1:
            begun.append(sequence)
        else:
            if computed >= sequence.end * block_size:
                taken += 1
                if taken > room:
                    return Schedule(preempt=running[-1])
            items.append((sequence, 1))
    budget -= len(items)
    room -= taken

    owed = [taken] * len(free)
    for sequence in begun:
        tokens = min(
            sequence.length - sequence.computed,
            budget,
            (sequence.end + room) * block_size - sequence.computed,
        )
        if tokens <= 0 < budget and sequence is not running[-1]:
            return Schedule(preempt=running[-1])
        if tokens > 0:
            items.append((sequence, tokens))
            budget -= tokens
            room -= max(0, _blocks(sequence.computed + tokens, block_size) - sequence.end)
        whole = max(0, _blocks(sequence.length, block_size) - sequence.end)
        for group, cap in enumerate(limits.group_caps):
            owed[group] += min(whole, cap)

    free = [blocks - debt for blocks, debt in zip(free, owed, strict=True)]
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
            blocks - cost - min(whole, cap)
            for blocks, cost, cap in zip(free, found.cost, limits.group_caps, strict=True)
        ]
        if active >= limits.max_sequences or (active and min(after, default=active) < active):
            if outranked:
                return Schedule(preempt=running[-1])
            break
        tokens = min(sequence.length - found.tokens, budget)
        if not active:
            # Alone it may fit only chunk by chunk, where groups have windows.
            room = min((b - c for b, c in zip(free, found.cost, strict=True)), default=UNBOUNDED)
            tokens = min(tokens, room * block_size)
        items.append((sequence, tokens))
        budget -= tokens
        free = after
        admitted.append(sequence)
        schedule.admitted.append((sequence, found))
    return schedule


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)
