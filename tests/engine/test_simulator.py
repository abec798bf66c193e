"""What scheduling does to people who wait, in virtual time."""

from __future__ import annotations

import pytest

from sartor.engine.engine import Engine
from sartor.engine.simulator import Arrival, Served, StepCost, replay
from sartor.plan import ExecutionPlan

# About SmolLM2-135M on two cores: short decodes of 16 in 10 ms, prompts at 3,500 tokens/s.
COST = StepCost(step=0.006, token=0.00026, state=1e-6)
PLAN = ExecutionPlan(max_sequences=64)


def run(trace: list[Arrival], blocks: int = 4096, plan: ExecutionPlan = PLAN) -> list[Served]:
    return replay(trace, COST, plan, blocks, look=Engine.check)


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def test_a_long_prompt_does_not_stall_running_answers() -> None:
    streams = [Arrival(0.0, 64, 700) for _ in range(16)]
    calm, busy = run(streams), run([*streams, Arrival(6.0, 6000, 8)])
    newcomer = busy.pop()
    first = newcomer.times[0]
    ratios = [
        (after - before) / alone
        for one, other in zip(busy, calm, strict=True)
        for before, after, alone in zip(one.times, one.times[1:], other.intervals(), strict=False)
        if 6.0 <= before < first
    ]
    assert quantile(ratios, 0.99) < 1.6
    # It is not starved either: it has nearly the third of the time that is its share.
    alone = run([Arrival(0.0, 6000, 1)])[0].times[0]
    assert newcomer.first_token_seconds < 5 * alone


@pytest.mark.parametrize("running", [0, 1, 4])
def test_a_crowd_of_prompts_goes_ahead_at_nearly_full_speed(running: int) -> None:
    crowd = [Arrival(1.0, 128, 64) for _ in range(60)]
    served = run([Arrival(0.0, 16, 200) for _ in range(running)] + crowd)[running:]
    together = 60 * 128 * COST.token + 64 * (COST.step + 60 * (COST.token + 150 * COST.state))
    assert max(s.first_token_seconds for s in served) < 1.2 * together
    assert max(s.times[-1] for s in served) - 1.0 < 1.3 * together


def test_short_prompts_overtake_a_long_one_and_do_not_stop_it() -> None:
    shorts = [Arrival(1.0 + i / 4, 50, 10) for i in range(40)]
    long, *others = run([Arrival(0.9, 50_000, 1), *shorts])
    assert max(s.first_token_seconds for s in others) < 0.5
    alone = run([Arrival(0.0, 50_000, 1)])[0].first_token_seconds
    assert long.first_token_seconds < 1.5 * alone


def test_two_tenants_get_alike_however_much_they_ask_for() -> None:
    greedy = [Arrival(0.0, 200, 50, tenant="greedy") for _ in range(200)]
    modest = [Arrival(2.0 + i, 200, 50, tenant="modest") for i in range(5)]
    plan = ExecutionPlan(max_sequences=8)
    served = run(greedy + modest, plan=plan)
    waits = [s.first_token_seconds for s in served[200:]]
    last = max(s.times[-1] for s in served)
    assert last > 10
    # As long as for a place to become free, and not to the end of the other's queue.
    assert max(waits) < 1.5


@pytest.mark.parametrize("share", [1.0, 2.0, 4.0])
def test_tokens_are_divided_by_share(share: float) -> None:
    trace = [
        Arrival(0.0, 100, 40, tenant=tenant, share=weight)
        for tenant, weight in (("one", 1.0), ("other", share))
        for _ in range(150)
    ]
    served = run(trace, plan=ExecutionPlan(max_sequences=8))
    half = max(s.times[-1] for s in served) / 2
    done = [sum(t < half for s in part for t in s.times) for part in (served[:150], served[150:])]
    assert done[1] / done[0] == pytest.approx(share, rel=0.15)


def test_nobody_saves_up_by_pausing() -> None:
    plan = ExecutionPlan(max_sequences=4)
    early = [Arrival(0.0, 100, 40, tenant="busy") for _ in range(60)]
    late = [Arrival(3.0, 100, 40, tenant="late") for _ in range(60)]
    served = run(early + late, plan=plan)
    stop = 3.0 + (max(s.times[-1] for s in served) - 3.0) / 3
    got = [
        sum(3.0 <= t < stop for s in part for t in s.times) for part in (served[:60], served[60:])
    ]
    assert got[1] / got[0] == pytest.approx(1.0, rel=0.25)


def test_higher_priority_starts_first_and_takes_a_place() -> None:
    trace = [Arrival(0.0, 100, 100) for _ in range(30)] + [Arrival(1.0, 100, 10, priority=1)]
    served = run(trace, plan=ExecutionPlan(max_sequences=4))
    assert served[-1].first_token_seconds < 0.2


def test_a_shared_prefix_is_computed_once() -> None:
    trace = [Arrival(0.0, 2030, 4, prefix_group=1, prefix_tokens=2000) for _ in range(64)]
    served = run(trace)
    blocks = 2000 // PLAN.block_size * PLAN.block_size
    assert sorted(s.cached_tokens for s in served) == [0] + [blocks] * 63


def test_a_repeated_prefix_costs_a_tenth() -> None:
    trace = [Arrival(at, 2030, 4, prefix_group=1, prefix_tokens=2000) for at in (0.0, 5.0)]
    first, second = run(trace)
    assert second.first_token_seconds < 0.1 * first.first_token_seconds


def test_everybody_is_served_when_memory_is_short() -> None:
    trace = [Arrival(i / 50, 100 + i, 60, leaves_after=None if i % 3 else 5) for i in range(60)]
    served = run(trace, blocks=24)
    assert [s.finish_reason for s in served] == ["length" if i % 3 else "abort" for i in range(60)]
    assert all(len(s.times) >= (60 if i % 3 else 5) for i, s in enumerate(served))


def test_answers_keep_their_pace_while_prompts_keep_coming() -> None:
    """Decodes become slower while there is always a prompt in the step: it is noticed."""
    streams = [Arrival(0.0, 32, 1500) for _ in range(16)]
    prompts = [Arrival(2.0 + i * 0.7, 300, 1) for i in range(60)]
    slow = {"factor": 1.0}

    def seconds(batch: object) -> float:
        return COST.seconds(batch) * slow["factor"]  # type: ignore[arg-type]

    def look(engine: Engine) -> None:
        slow["factor"] = 2.0 if engine.records and engine.records[-1].index > 400 else 1.0

    served = replay(streams + prompts, seconds, PLAN, 4096, look)
    late = [t for s in served[:16] for t in s.intervals(20.0, 30.0)]
    assert len(late) > 1000
    alone = 2 * (COST.step + 16 * (COST.token + 1000 * COST.state))
    assert quantile(late, 0.9) < 2.9 * alone
    assert max(s.first_token_seconds for s in served[16:]) < 5.0


def test_who_fills_all_places_with_long_answers_gives_one_up() -> None:
    greedy = [Arrival(0.0, 50, 2000, tenant="greedy") for _ in range(64)]
    modest = [Arrival(5.0 + i, 50, 10, tenant="modest") for i in range(5)]
    plan = ExecutionPlan(max_sequences=32)
    served = run(greedy + modest, plan=plan)
    assert max(s.first_token_seconds for s in served[64:]) < 0.2
    # What they had computed is found again: all take hardly longer for it.
    alone = run(greedy, plan=plan)
    assert max(s.times[-1] for s in served) < 1.02 * max(s.times[-1] for s in alone)
