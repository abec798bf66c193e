"""What a worker tells of its engines."""

from __future__ import annotations

from typing import Any

import pytest
from engine_helpers import Engine, make_engine, prompt, request

from sartor.engine.step import StepRecord
from sartor.serving.messages import EngineStats, StepTotals
from sartor.serving.meter import REPORT_SECONDS, STEP_BOUNDS, Meter, Reporter


def totals(records: list[StepRecord]) -> tuple[int, int, int, int]:
    return (
        sum(r.prompt_tokens for r in records),
        sum(r.decode_tokens for r in records),
        sum(r.output_tokens for r in records),
        sum(r.preempted for r in records),
    )


def run(engine: Engine, meter: Meter, every: int) -> list[StepRecord]:
    """Drains after every so many steps; all records, as the engine made them."""
    seen: list[StepRecord] = []
    count = 0
    while engine.has_work:
        engine.step()
        seen.append(engine.records[-1])
        count += 1
        if count % every == 0:
            meter.drain()
    meter.drain()
    return seen


@pytest.mark.parametrize("every", [1, 7])
def test_sums_are_those_of_the_records(every: int) -> None:
    # Too few blocks for all at their full length: somebody is preempted.
    engine = make_engine(blocks=8, context=64)
    meter = Meter("m", engine)
    for i in range(4):
        engine.add(request(f"r{i}", prompt(i, 20), max_tokens=30))
    assert (meter.stats().running, meter.stats().waiting) == (0, 4)
    records = run(engine, meter, every)
    stats = meter.stats()
    got = stats.totals
    assert (
        got.prompt_tokens,
        got.decode_tokens,
        got.output_tokens,
        got.preemptions,
    ) == totals(records)
    assert got.preemptions > 0
    assert got.output_tokens == 4 * 30
    assert sum(got.step_times) == len(records)
    host = got.schedule_seconds + got.build_seconds + got.post_seconds
    assert host == pytest.approx(sum(r.host_seconds for r in records))
    assert got.execute_seconds == pytest.approx(sum(r.execute_seconds for r in records))
    assert (stats.running, stats.waiting) == (0, 0)
    (use,) = stats.states
    assert (use.held, use.total) == (0, 8)
    assert use.cached > 0
    assert use.block_bytes * use.total == stats.memory["state"]


def test_steps_are_counted_by_their_time() -> None:
    engine = make_engine()
    meter = Meter("m", engine)
    engine.add(request("r", prompt(0, 20), max_tokens=1))
    engine.step()
    record = engine.records.pop()
    for index, seconds in enumerate((0.0001, STEP_BOUNDS[3], STEP_BOUNDS[3] * 1.01, 60.0)):
        engine.records.append(
            StepRecord(
                **{
                    **{name: getattr(record, name) for name in StepRecord.__slots__},
                    "index": index,
                    "schedule_seconds": 0.0,
                    "build_seconds": 0.0,
                    "execute_seconds": seconds,
                    "post_seconds": 0.0,
                }
            )
        )
    meter.drain()
    times = meter.stats().totals.step_times
    assert {i: count for i, count in enumerate(times) if count} == {0: 1, 3: 1, 4: 1, 14: 1}


def test_what_an_abort_frees_is_seen_without_a_step() -> None:
    engine = make_engine()
    meter = Meter("m", engine)
    engine.add(request("r", prompt(0, 20), max_tokens=50))
    engine.step()
    assert meter.stats().states[0].held == 2
    engine.abort("r")
    assert (meter.stats().states[0].held, meter.stats().running) == (0, 0)


def test_reports_come_once_a_second_and_at_rest() -> None:
    engine = make_engine()
    now = [0.0]
    sent: list[EngineStats] = []
    reporter = Reporter({"m": engine}, sent.append, lambda: now[0])
    engine.add(request("r", prompt(0, 20), max_tokens=30))
    for _ in range(10):
        engine.step()
        reporter.turn(idle=False)
    assert [s.totals.output_tokens for s in sent] == [1]
    now[0] = REPORT_SECONDS
    engine.step()
    reporter.turn(idle=False)
    assert [s.totals.output_tokens for s in sent] == [1, 11]
    while engine.has_work:
        engine.step()
        reporter.turn(idle=False)
    for _ in range(3):  # nothing new is not sent again
        reporter.turn(idle=True)
    assert [s.totals.output_tokens for s in sent] == [1, 11, 30]


def test_an_encoder_counts_what_it_reads(tmp_path: Any) -> None:
    from tiny_encoder import write_tiny_encoder

    from sartor.engine.load import load, make_encoder
    from sartor.plan import ExecutionPlan

    folder = write_tiny_encoder(tmp_path / "bert")
    loaded = load(folder, ExecutionPlan(backend="reference", device="reference"), "bert", None)
    encoder = make_encoder(loaded)
    meter = Meter("bert", encoder)
    encoder.add(request("r", (2, 5, 3)))
    assert meter.stats().waiting == 1
    encoder.step()
    meter.drain()
    stats = meter.stats()
    assert (stats.totals.prompt_tokens, sum(stats.totals.step_times)) == (3, 1)
    assert (stats.waiting, stats.states) == (0, ())
    assert stats.memory["weights"] > 0
    assert stats.totals.execute_seconds > 0


def test_totals_add_up() -> None:
    one = StepTotals(1, 2, 3, 4, 0.5, 1.5, 2.5, 3.5, (1, 0))
    two = StepTotals(10, 20, 30, 40, 1.0, 2.0, 3.0, 4.0, (0, 5))
    assert one + two == StepTotals(11, 22, 33, 44, 1.5, 3.5, 5.5, 7.5, (1, 5))
    assert StepTotals() + one == one + StepTotals() == one
