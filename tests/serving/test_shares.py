"""What keys share: rooms of which none may fill all, and fair turns."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from sartor.serving.shares import FairTurns, Pace, Room


def half() -> float:
    return 0.5


def test_a_key_holds_its_part_and_all_keys_the_whole() -> None:
    room = Room(100, half)
    assert room.full("a", 50) == ""
    room.take("a", 50)
    assert room.full("a", 1) == "key"
    assert room.full("b", 50) == ""
    room.take("b", 50)
    assert room.full("c", 1) == "all"
    assert (room.held, room.of("a"), room.of("c")) == (100, 50, 0)
    room.give("a", 50)
    assert room.keys() == {"b": 50}
    assert room.full("a", 50) == ""


def test_a_key_by_itself_has_all() -> None:
    room = Room(100)
    assert room.full("a", 100) == ""
    assert room.full("a", 101) == "all"


def test_a_part_is_never_nothing() -> None:
    assert Room(1, half).full("a", 1) == ""


async def _work(turns: FairTurns, key: str, share: float, seconds: float, log: list[str]) -> None:
    async with turns.turn(key, share):
        log.append(key)
        await asyncio.sleep(seconds)


def run(jobs: list[tuple[str, float, float]], turns: FairTurns) -> list[str]:
    """The keys in the order in which they got their turns; all came at once."""
    log: list[str] = []

    async def all_of_them() -> None:
        await asyncio.gather(*(_work(turns, key, share, s, log) for key, share, s in jobs))

    asyncio.run(all_of_them())
    return log


def test_a_key_with_little_work_does_not_wait_for_one_with_much() -> None:
    log = run([("bad", 1, 0.02)] * 10 + [("good", 1, 0.001)] * 3, FairTurns(1))
    assert log[0] == "bad"
    assert log[1:4] == ["good"] * 3


def test_turns_follow_shares() -> None:
    log = run([("one", 1, 0.02)] * 12 + [("three", 3, 0.02)] * 12, FairTurns(1))
    assert 7 <= Counter(log[:12])["three"] <= 10


def test_one_key_leaves_a_place_to_others() -> None:
    log: list[str] = []

    async def scene() -> None:
        turns = FairTurns(2, half)
        bad = [asyncio.create_task(_work(turns, "bad", 1, 0.2, log)) for _ in range(4)]
        await asyncio.sleep(0.01)
        await asyncio.wait_for(_work(turns, "good", 1, 0, log), 0.1)
        for task in bad:
            task.cancel()
        await asyncio.gather(*bad, return_exceptions=True)

    asyncio.run(scene())
    assert log == ["bad", "good"]


def test_who_comes_back_has_saved_nothing_up() -> None:
    log: list[str] = []

    async def scene() -> None:
        turns = FairTurns(1)
        first = [asyncio.create_task(_work(turns, "a", 1, 0.01, log)) for _ in range(6)]
        await asyncio.sleep(0.035)
        # By now a has used some; b starts level with it, and does not get all at once.
        late = [asyncio.create_task(_work(turns, "b", 1, 0.01, log)) for _ in range(4)]
        await asyncio.gather(*first, *late)

    asyncio.run(scene())
    assert "a" in log[log.index("b") + 1 : log.index("b") + 4]


@pytest.mark.parametrize("seed", range(5))
def test_cancelled_waits_lose_no_place(seed: int) -> None:
    draw = random.Random(seed)

    async def scene() -> None:
        turns = FairTurns(2, half)
        log: list[str] = []
        for _ in range(30):
            tasks = [
                asyncio.create_task(_work(turns, draw.choice("abc"), 1, 0.001, log))
                for _ in range(6)
            ]
            for task in tasks:
                if draw.random() < 0.5:
                    await asyncio.sleep(0)
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        # All places are free again.
        log.clear()
        await asyncio.wait_for(asyncio.gather(*(_work(turns, k, 1, 0, log) for k in "xy")), 1)
        assert sorted(log) == ["x", "y"]
        assert not turns._used

    asyncio.run(scene())


def test_who_sends_much_waits_and_nobody_else() -> None:
    pace = Pace(1000.0)
    pace.delay("good", 0, 9.0)
    assert pace.delay("bad", 500, 10.0) == pytest.approx(0.5)
    assert pace.delay("bad", 500, 10.0) == pytest.approx(1.0)
    assert pace.delay("bad", 0, 10.5) == pytest.approx(0.5)
    assert pace.delay("good", 10, 10.0) == pytest.approx(0.01)
    assert pace.delay("bad", 100, 12.0) == pytest.approx(0.1)
    for i in range(3000):
        pace.delay(f"key{i}", 1, 13.0 + i)
    assert len(pace._free) < 1100


def test_a_key_that_is_alone_keeps_no_pace() -> None:
    pace = Pace(1.0)
    assert pace.delay("a", 100, 0.0) == 0
    assert pace.delay("b", 100, 1.0) == pytest.approx(100)
    assert pace.delay("b", 0, 10.9) == pytest.approx(90.1)
    assert pace.delay("b", 100, 11.0) == 0  # nobody else for ten seconds
    assert pace.delay("a", 1, 12.0) == pytest.approx(1)
    assert pace.delay("b", 0, 12.0) == 0  # what it took while it was alone is not held against it
