"""What runs in the next step: a pure decision over what is waiting, running and free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

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
    def start(self) -> int:
        """Tokens whose state was there when it began."""

    @property
    def end(self) -> int:
        """State blocks held or passed, from the start of the sequence."""

    @property
    def priority(self) -> int: ...

    @property
    def tenant(self) -> str: ...

    @property
    def share(self) -> float: ...


class Reusable(Protocol):
    """What the scheduler reads of a waiting sequence's cached prefix (`cache.Prefix`)."""

    @property
    def tokens(self) -> int: ...

    @property
    def cost(self) -> tuple[int, ...]: ...

    @property
    def hold(self) -> bool: ...


S = TypeVar("S", bound=Runnable)
S_co = TypeVar("S_co", bound=Runnable, covariant=True)
P = TypeVar("P", bound=Reusable)


class Line(Protocol[S_co]):
    """Waiting sequences in order, made up as far as they are asked for."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[S_co]: ...


@dataclass(frozen=True)
class Limits:
    """What a step may use.

    ``group_caps``: per state group, the most blocks that one sequence holds at once during
    its prompt (:data:`UNBOUNDED` without a window); ``step_caps``: the most that one step takes
    of it (:data:`UNBOUNDED` but in recurrent groups, which take one wherever a step ends).
    ``aligned`` ends the chunks of a prompt with a block where they can, and always before its
    last token: only there a recurrent state can be shared. ``row_tile``: see
    :class:`~sartor.graph.Capabilities`.
    """

    max_batch_tokens: int
    max_sequences: int
    block_size: int
    group_caps: tuple[int, ...]
    step_caps: tuple[int, ...]
    aligned: bool = False
    row_tile: int = 1

    def whole_tiles(self, decodes: int, budget: int) -> int:
        """About so many tokens of prompts, such that with the decodes they fill tiles of rows:
        the backend takes nearly as long for a part of one. A budget of a few stays what it is."""
        if budget < 2 * self.row_tile:
            return budget
        return (decodes + budget + self.row_tile // 2) // self.row_tile * self.row_tile - decodes

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
    waiting: Line[S],
    available: Sequence[int],
    limits: Limits,
    prefix: Callable[[S, Sequence[S]], P],
    prompt_budget: Callable[[int, int, bool], int] = lambda decodes, prompts, long: UNBOUNDED,
) -> Schedule[S, P]:
    """Chooses the sequences of the next step and the tokens of each.

    ``running`` comes in order of priority, then arrival, ``waiting`` in the order in which they
    are to start; ``available`` counts the free blocks of each group; ``prefix(sequence,
    admitted)`` looks up what a waiting sequence could reuse, given those admitted in this step;
    ``prompt_budget(decodes, prompts, long)``: tokens that a step of so many decodes can spend on
    prompts, when so many could use them, and on long ones (:class:`~sartor.engine.pace.Pace`).

    - Every decode has its place in every step. Prompts share what the budget leaves: those that
      have begun go before new ones, unless these have a higher priority.
    - Prompts too long for one full step go one after the other, and leave to short ones, if there
      are any, all but half of their budget: these overtake, but never stop, a long one.
    - When blocks run out, the last in order gives way (the youngest of the lowest priority):
      the first in order always goes on, so everything ends.
    - A new prompt starts only if its blocks fit beside those that begun prompts still need,
      and one more for each running sequence. None overtakes it for want of blocks.
    - Where all places are taken, the youngest of the tenant that has most gives way to the first
      that waits, if that tenant still has no less than the other afterwards, each by its share.
      What it had computed stays cached where there is room.
    """
    step: _Step[S, P] = _Step(running, waiting, available, limits, prompt_budget)
    return step.decide(prefix)


class _Step(Generic[S, P]):
    """One decision on its way: what is left of the token budget and of the blocks."""

    def __init__(
        self,
        running: Sequence[S],
        waiting: Line[S],
        available: Sequence[int],
        limits: Limits,
        prompt_budget: Callable[[int, int, bool], int],
    ) -> None:
        self.running = running
        self.waiting = waiting
        self.limits = limits
        self.prompt_budget = prompt_budget
        self.free = list(available)
        self.budget = self.long_budget = 0
        self.schedule: Schedule[S, P] = Schedule()

    def decide(self, prefix: Callable[[S, Sequence[S]], P]) -> Schedule[S, P]:
        try:
            begun = self._decodes()
            # Those that could compute now: others only wait for a place.
            places = self.limits.max_sequences - len(self.running)
            prompts = len(begun) + max(0, min(len(self.waiting), places))
            if begun or self.waiting:
                decodes = len(self.schedule.items)
                most = self.limits.max_batch_tokens - decodes
                whole = partial(self.limits.whole_tiles, decodes)
                self.budget = min(most, whole(self.prompt_budget(decodes, prompts, False)))
                long_budget = whole(self.prompt_budget(decodes, prompts, True))
                self.long_budget = min(self.budget, long_budget)
                self._prompts(begun, prefix)
        except _NoBlocks:
            return Schedule(preempt=self.running[-1])
        except _TooManyPlacesError as found:
            return Schedule(preempt=found.sequence)
        return self.schedule

    def _decodes(self) -> list[S]:
        """Takes every decode into the step; returns the prompts that have begun."""
        begun = []
        for sequence in self.running:
            computed = sequence.computed
            if sequence.length - computed > 1:
                begun.append(sequence)
            elif sequence.length > computed:
                if computed >= sequence.end * self.limits.block_size:
                    if self.limits.reach(self.free) < 1:
                        raise _NoBlocks
                    self.free = self.limits.take(self.free, 1)
                self.schedule.items.append((sequence, 1))
        return begun

    def _prompts(self, begun: list[S], prefix: Callable[[S, Sequence[S]], P]) -> None:
        top = next((s.priority for s in self.waiting), None)
        now = [s for s in begun if top is None or s.priority >= top]
        long = [s for s in now if self._is_long(s.length - s.start)]
        spare = self._spare(begun)
        budget = self.budget
        half = -(-self.long_budget // 2)
        lane = budget - half if long else budget
        for sequence in now:
            if not self._is_long(sequence.length - sequence.start):
                lane -= self._go_on(sequence, lane)
        newcomer = self._admit(spare, lane, half, bool(long), prefix)
        left = max(half, self.long_budget - (budget - self.budget))
        for sequence in (*long, *begun[len(now) :]):
            left -= self._go_on(sequence, min(left, self.budget))
        if newcomer is not None:
            self._start(*newcomer, min(left, self.budget))

    def _is_long(self, tokens: int) -> bool:
        return tokens > self.limits.max_batch_tokens

    def _spare(self, begun: Sequence[S]) -> list[int]:
        """Blocks beyond those that begun prompts still need; may be negative."""
        spare = list(self.free)
        for sequence in begun:
            whole = max(0, _blocks(sequence.length, self.limits.block_size) - sequence.end)
            for group, cap in enumerate(self.limits.group_caps):
                spare[group] -= min(whole, cap)
        return spare

    def _go_on(self, sequence: S, most: int) -> int:
        """The next chunk of a begun prompt, of at most ``most`` tokens; how many it got."""
        if most <= 0:
            return 0
        block_size = self.limits.block_size
        reach = (sequence.end + self.limits.reach(self.free)) * block_size - sequence.computed
        tokens = self.limits.chunk(sequence.computed, sequence.length, min(most, reach))
        if tokens <= 0:
            if sequence is not self.running[-1]:
                raise _NoBlocks
            return 0
        blocks = _blocks(sequence.computed + tokens, block_size) - sequence.end
        self.free = self.limits.take(self.free, max(0, blocks))
        self._take(sequence, tokens)
        return tokens

    def _admit(
        self,
        spare: list[int],
        lane: int,
        half: int,
        long: bool,
        prefix: Callable[[S, Sequence[S]], P],
    ) -> tuple[S, P, int] | None:
        """Starts short prompts with ``lane`` tokens in all. Returns a long one, for which ``half``
        is kept, its prefix, and for how many tokens there are blocks; none where another ``long``
        one is running."""
        limits, running = self.limits, self.running
        newcomer: tuple[S, P, int] | None = None
        admitted: list[S] = []
        for sequence in self.waiting:
            if lane <= 0:
                break
            active = len(running) + len(admitted)
            outranked = bool(running) and running[-1].priority < sequence.priority
            if active >= limits.max_sequences and not outranked:
                self._take_back(sequence)
                break
            found = prefix(sequence, admitted)
            if found.hold:
                continue
            is_long = self._is_long(sequence.length - found.tokens)
            if is_long and long:
                continue
            whole = _blocks(sequence.length, limits.block_size) - found.tokens // limits.block_size
            after = [
                left - cost - min(whole, cap)
                for left, cost, cap in zip(spare, found.cost, limits.group_caps, strict=True)
            ]
            if active >= limits.max_sequences or (active and min(after, default=active) < active):
                if outranked:
                    raise _NoBlocks
                break
            most = UNBOUNDED
            if not active:
                # Alone it may fit only chunk by chunk, where groups have windows.
                room = [left - cost for left, cost in zip(spare, found.cost, strict=True)]
                most = limits.reach(room) * limits.block_size
            admitted.append(sequence)
            spare = after
            if is_long:
                newcomer, long = (sequence, found, most), True
                lane = min(lane, self.budget - half)
            else:
                lane -= self._start(sequence, found, most, lane)
        return newcomer

    def _take_back(self, sequence: S) -> None:
        """Has a tenant with too many places give one to a waiting sequence."""
        held: dict[str, float] = {}
        youngest: dict[str, S] = {}
        for other in self.running:
            held[other.tenant] = held.get(other.tenant, 0.0) + 1 / other.share
            if other.priority <= sequence.priority:
                youngest[other.tenant] = other
        mine = held.get(sequence.tenant, 0.0) + 1 / sequence.share
        most = max(youngest, key=held.__getitem__, default=sequence.tenant)
        # A little less than equal is equal: shares are fractions.
        if most != sequence.tenant and held[most] - 1 / youngest[most].share > mine - 1e-6:
            raise _TooManyPlacesError(youngest[most])

    def _start(self, sequence: S, found: P, most: int, lane: int) -> int:
        tokens = self.limits.chunk(found.tokens, sequence.length, min(most, lane))
        if tokens > 0:
            self._take(sequence, tokens)
            self.schedule.admitted.append((sequence, found))
        return tokens

    def _take(self, sequence: S, tokens: int) -> None:
        self.schedule.items.append((sequence, tokens))
        self.budget -= tokens


class _NoBlocks(Exception):
    """Somebody has to give way."""


class _TooManyPlacesError(Exception):
    """A tenant has more than its share, and another waits."""

    def __init__(self, sequence: Any) -> None:
        super().__init__()
        self.sequence = sequence


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)
