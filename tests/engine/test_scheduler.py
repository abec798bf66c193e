from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from sartor.engine.scheduler import UNBOUNDED, Limits, Schedule, decide


@dataclass
class Seq:
    name: str
    length: int
    computed: int = 0
    end: int = 0
    priority: int = 0
    start: int = 0
    tenant: str = ""
    share: float = 1.0


@dataclass(frozen=True)
class Found:
    tokens: int = 0
    cost: tuple[int, ...] = (0,)
    hold: bool = False


def decoding(name: str, length: int = 20, priority: int = 0) -> Seq:
    return Seq(name, length, length - 1, -(-(length - 1) // 16), priority)


def plan(
    running: Sequence[Seq] = (),
    waiting: Sequence[Seq] = (),
    available: int = 100,
    found: dict[str, Found] | None = None,
    tokens: int = 32,
    sequences: int = 8,
    budgets: tuple[int, int] = (UNBOUNDED, UNBOUNDED),
    row_tile: int = 1,
) -> Schedule[Seq, Found]:
    return decide(
        running,
        waiting,
        (available,),
        Limits(tokens, sequences, 16, (UNBOUNDED,), (UNBOUNDED,), row_tile=row_tile),
        lambda s, admitted: (found or {}).get(s.name, Found()),
        lambda decodes, prompts, long: budgets[long],
    )


def names(schedule: Schedule[Seq, Found]) -> list[tuple[str, int]]:
    return [(s.name, n) for s, n in schedule.items]


def test_decodes_go_first_then_begun_prompts_then_new_ones() -> None:
    running = [Seq("begun", 48, 4, 1), decoding("d1"), decoding("d2")]
    schedule = plan(running, [Seq("new", 5)], tokens=50)
    assert names(schedule) == [("d1", 1), ("d2", 1), ("begun", 44), ("new", 4)]
    assert [s.name for s, _ in schedule.admitted] == ["new"]


def test_the_token_budget_cuts_the_last_prompt() -> None:
    assert names(plan(waiting=[Seq("a", 20), Seq("b", 20), Seq("c", 20)])) == [("a", 20), ("b", 12)]


def test_short_prompts_overtake_a_long_one_which_keeps_half() -> None:
    long = Seq("long", 200, 16, 1)
    assert names(plan([long])) == [("long", 32)]
    assert names(plan([long], [Seq("a", 10)])) == [("a", 10), ("long", 22)]
    assert names(plan([long], [Seq("a", 20)])) == [("a", 16), ("long", 16)]
    assert names(plan(waiting=[Seq("long", 200), Seq("a", 20)])) == [("a", 16), ("long", 16)]
    short = Seq("short", 30, 5, 1)
    assert names(plan([long, short], [Seq("a", 20)])) == [("short", 16), ("long", 16)]
    # What is long by itself and short for what the cache has is short.
    found = {"a": Found(192, (0,))}
    assert names(plan([long], [Seq("a", 200)], found=found)) == [("a", 8), ("long", 24)]


def test_long_prompts_go_one_after_the_other() -> None:
    waiting = [Seq("one", 100), Seq("two", 100), Seq("short", 5)]
    assert names(plan(waiting=waiting)) == [("short", 5), ("one", 27)]
    begun = [Seq("one", 100, 16, 1)]
    assert names(plan(begun, waiting[1:])) == [("short", 5), ("one", 27)]


def test_a_budget_of_their_own_holds_for_long_prompts() -> None:
    long = Seq("long", 200, 16, 1)
    assert names(plan([long], budgets=(20, 8))) == [("long", 8)]
    assert names(plan([long], [Seq("a", 3)], budgets=(20, 8))) == [("a", 3), ("long", 5)]
    assert names(plan([long], [Seq("a", 30)], budgets=(20, 8))) == [("a", 16), ("long", 4)]
    assert names(plan([decoding("d"), long], budgets=(0, 0))) == [("d", 1)]


def test_prompts_fill_tiles_of_rows() -> None:
    def tokens(decodes: int, budget: int, most: int = 512) -> int:
        running = [decoding(f"d{i}") for i in range(decodes)]
        prompts = [Seq("p", 400)]
        step = plan(running, prompts, tokens=most, sequences=32, budgets=(budget,) * 2, row_tile=16)
        return dict(names(step)).get("p", 0)

    for decodes in (0, 1, 3, 16, 17):
        for budget in range(32, 100):
            assert (decodes + tokens(decodes, budget)) % 16 == 0
            assert abs(tokens(decodes, budget) - budget) <= 8
    assert tokens(3, 31) == 31, "a small budget is not doubled"
    assert tokens(3, 1000, most=50) == 47, "nor is a step ever longer than it may be"


def test_a_begun_prompt_of_lower_priority_goes_after_new_ones() -> None:
    low = Seq("low", 30, 5, 1, priority=-1)
    assert names(plan([low], [Seq("new", 30)])) == [("new", 30), ("low", 2)]


def test_a_cached_prefix_is_not_computed_again() -> None:
    schedule = plan(waiting=[Seq("a", 60)], found={"a": Found(48)})
    assert names(schedule) == [("a", 12)]


def test_nobody_overtakes_a_prompt_that_does_not_fit() -> None:
    running = [decoding("d", 20)]
    assert names(plan(running, [Seq("big", 90), Seq("small", 5)], available=5)) == [("d", 1)]
    assert names(plan(running, [Seq("big", 70), Seq("small", 5)], available=6))[1][0] == "big"


def test_blocks_of_a_prefix_count_when_nobody_else_holds_them() -> None:
    running = [decoding("d", 20)]
    waiting = [Seq("a", 64)]
    assert len(names(plan(running, waiting, 4, {"a": Found(48, (0,))}))) == 2
    assert len(names(plan(running, waiting, 4, {"a": Found(48, (3,))}))) == 1


def test_new_prompts_leave_what_begun_ones_still_need() -> None:
    begun = Seq("begun", 100, 16, 1)
    for available, started in ((8, False), (9, True)):
        schedule = plan([begun], [Seq("new", 30)], available, tokens=100)
        assert names(schedule) == [("begun", 84), ("new", 16)][: 1 + started]


def test_a_prompt_on_hold_is_passed_over() -> None:
    schedule = plan(waiting=[Seq("a", 20), Seq("b", 5)], found={"a": Found(hold=True)})
    assert names(schedule) == [("b", 5)]


def test_the_youngest_gives_way_when_a_decode_needs_a_block() -> None:
    running = [decoding("old", 17), decoding("young", 20)]
    schedule = plan(running, available=0)
    assert schedule.preempt is running[1]
    assert not schedule.items


def test_a_prompt_shrinks_to_the_blocks_left_and_the_older_one_goes_on() -> None:
    old, young = Seq("old", 100, 16, 1), Seq("young", 100, 16, 1)
    assert names(plan([old, young], available=1)) == [("old", 16)]
    assert plan([old, young], available=0).preempt is young


def test_higher_priority_takes_the_place_of_lower() -> None:
    running = [decoding("normal"), decoding("low", priority=-1)]
    waiting = [Seq("urgent", 5, priority=1)]
    assert plan(running, waiting, sequences=2).preempt is running[1]
    assert plan(running, waiting, available=0, sequences=8).preempt is running[1]
    waiting = [Seq("same", 5, priority=-1)]
    assert plan(running, waiting, sequences=2).preempt is None


RECURRENT = Limits(100, 8, 16, (UNBOUNDED, 2), (UNBOUNDED, 1), aligned=True)


def recurrent(
    running: Sequence[Seq] = (),
    waiting: Sequence[Seq] = (),
    available: tuple[int, int] = (100, 100),
    limits: Limits = RECURRENT,
) -> Schedule[Seq, Found]:
    return decide(
        running, waiting, available, limits, lambda s, admitted: Found(cost=(0,) * len(available))
    )


def test_a_recurrent_state_takes_one_block_a_step_however_long() -> None:
    begun = Seq("begun", 97, 16, 1)
    assert names(recurrent([begun], available=(5, 1))) == [("begun", 80)]
    assert names(recurrent([begun], available=(4, 1))) == [("begun", 64)]
    assert recurrent([begun, Seq("y", 97, 16, 1)], available=(9, 0)).preempt is not None
    # Within its run a sequence goes on where it is.
    assert names(recurrent([Seq("d", 20, 19, 2)], available=(0, 0))) == [("d", 1)]
    assert recurrent([Seq("old", 33, 32, 2), decoding("y")], available=(9, 0)).preempt is not None


def test_new_prompts_leave_a_state_for_every_running_one() -> None:
    running = [decoding("d1"), decoding("d2")]
    waiting = [Seq("new", 90)]
    assert len(names(recurrent(running, waiting, (100, 4)))) == 3
    assert len(names(recurrent(running, waiting, (100, 3)))) == 2


def test_chunks_end_with_a_block_and_before_the_last_token() -> None:
    sizes = []
    s = Seq("a", 250)
    while s.length - s.computed:
        (item,) = names(recurrent([s]))
        sizes.append(item[1])
        s.computed += item[1]
        s.end = -(-s.computed // 16)
    assert sizes == [96, 96, 48, 10]
    assert names(recurrent(waiting=[Seq("a", 64)])) == [("a", 48)]
    assert names(recurrent(waiting=[Seq("a", 16)])) == [("a", 16)]
    # A budget below a block is used as it is.
    small = dataclasses.replace(RECURRENT, max_batch_tokens=7)
    assert names(recurrent([Seq("a", 60, 7, 1)], limits=small)) == [("a", 7)]
    assert names(recurrent([Seq("a", 60, 14, 1)], limits=small)) == [("a", 2)]


@given(st.data())
def test_budgets_hold_and_someone_always_goes_on(data: st.DataObject) -> None:
    number = st.integers(1, 200)
    running = []
    for i in range(data.draw(st.integers(0, 5))):
        length = data.draw(number)
        computed = data.draw(st.integers(0, length - 1))
        running.append(Seq(f"r{i}", length, computed, -(-computed // 16)))
    waiting = [Seq(f"w{i}", data.draw(number)) for i in range(data.draw(st.integers(0, 5)))]
    # With nobody running every block is free, and they are enough for one sequence at least.
    available = data.draw(st.integers(0 if running else 13, 40))
    states = data.draw(st.integers(0 if running else 2, 20))
    tokens = data.draw(st.integers(6, 64))
    aligned = data.draw(st.booleans())
    limits = Limits(tokens, 6, 16, (UNBOUNDED, 2), (UNBOUNDED, 1), aligned)
    schedule = recurrent(running, waiting, (available, states), limits)
    if schedule.preempt is not None:
        assert schedule.preempt is running[-1]
        return
    assert sum(n for _, n in schedule.items) <= tokens
    assert all(0 < n <= s.length - s.computed for s, n in schedule.items)
    blocks = [max(0, -(-(s.computed + n) // 16) - s.end) for s, n in schedule.items]
    assert sum(blocks) <= available
    assert sum(min(1, n) for n in blocks) <= states
    if len(running) > 1 or (waiting and not running):
        assert schedule.items


def of(tenant: str, number: int, share: float = 1.0, priority: int = 0) -> Seq:
    found = decoding(f"{tenant}{number}", priority=priority)
    found.tenant, found.share = tenant, share
    return found


def waits(tenant: str, share: float = 1.0, priority: int = 0) -> Seq:
    return Seq(f"{tenant} new", 10, priority=priority, tenant=tenant, share=share)


def test_a_tenant_with_most_places_gives_one_to_who_has_fewer() -> None:
    running = [*(of("bad", i) for i in range(6)), of("other", 0), of("other", 1)]
    assert plan(running, [waits("good")]).preempt is running[5]
    # Who has few keeps them, and who has many gets no more.
    assert plan(running, [waits("other")]).preempt is running[5]
    assert plan(running, [waits("bad")]).preempt is None
    # A free place is taken first.
    assert plan(running, [waits("good")], sequences=9).preempt is None


def test_places_are_not_passed_to_and_fro() -> None:
    running = [*(of("a", i) for i in range(4)), *(of("b", i) for i in range(4))]
    for tenant in "ab":
        assert plan(running, [waits(tenant)]).preempt is None
    uneven = [*(of("a", i) for i in range(5)), *(of("b", i) for i in range(3))]
    assert plan(uneven, [waits("b")]).preempt is uneven[4]
    assert plan(uneven, [waits("a")]).preempt is None


def test_places_follow_shares() -> None:
    running = [*(of("big", i, 3.0) for i in range(6)), *(of("small", i) for i in range(2))]
    assert plan(running, [waits("small")]).preempt is None
    running = [*(of("big", i, 3.0) for i in range(7)), of("small", 0)]
    assert plan(running, [waits("small")]).preempt is running[6]


def test_no_place_is_taken_from_a_higher_priority() -> None:
    running = [of("bad", i, priority=1) for i in range(8)]
    assert plan(running, [waits("good")]).preempt is None
    assert plan(running, [waits("good", priority=1)]).preempt is running[7]
