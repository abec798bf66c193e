from __future__ import annotations

import pytest

from sartor.engine.sizing import size_state
from sartor.errors import CapacityError
from sartor.graph import StateGroup
from sartor.plan import ExecutionPlan

PLAN = ExecutionPlan(block_size=32, max_batch_tokens=64, max_sequences=4)


def groups(*windows: int) -> list[StateGroup]:
    return [StateGroup(i, window, (i,)) for i, window in enumerate(windows)]


MIXED = [StateGroup(0, 0, (0,)), StateGroup(1, 2, (1,), "recurrent")]


def test_no_more_than_all_sequences_can_use() -> None:
    assert size_state(groups(0), [100], PLAN, 1024, 1 << 40) == (4 * 32,)
    # A window of 100 tokens: 4 blocks, 2 for a chunk, 2 more.
    assert size_state(groups(0, 100), [100, 500], PLAN, 1024, 1 << 40) == (128, 32)


def test_groups_share_evenly_what_there_is() -> None:
    assert size_state(groups(0, 100), [100, 300], PLAN, 1024, 4 * 4000) == (10, 10)
    # 32 is all that the window group can use; the rest is for the other.
    assert size_state(groups(0, 100), [100, 300], PLAN, 1024, 4 * 20000) == (104, 32)


def test_the_plan_decides() -> None:
    assert size_state(groups(0), [100], PLAN.replace(state_bytes=3000), 1024, 0) == (30,)


def test_too_little_names_what_will_do() -> None:
    with pytest.raises(CapacityError, match="state_bytes of 200"):
        size_state(groups(0), [100], PLAN.replace(state_bytes=100), 1024, 0)


def test_a_program_without_state() -> None:
    assert size_state(groups(), [], PLAN, 1024, 100) == ()


def test_recurrent_states_for_all_sequences_and_some_snapshots() -> None:
    assert size_state(MIXED, [100, 5000], PLAN, 1024, 1 << 40) == (128, 4 * 4)
    # Beside what the other group cannot use, they may take more than half.
    assert size_state(MIXED, [100, 5000], PLAN, 1024, 4 * 92_800) == (128, 16)
    assert size_state(MIXED, [100, 5000], PLAN, 1024, 4 * 82_800) == (128, 14)
    assert size_state(MIXED, [100, 5000], PLAN, 1024, 4 * 20_000) == (100, 2)
    assert size_state(MIXED[1:], [5000], PLAN, 1024, 4 * 20_000) == (4,)


def test_what_the_error_names_is_enough_with_recurrent_states() -> None:
    with pytest.raises(CapacityError, match="state_bytes of 10200"):
        size_state(MIXED, [100, 5000], PLAN.replace(state_bytes=10_000), 1024, 0)
    assert size_state(MIXED, [100, 5000], PLAN.replace(state_bytes=10_200), 1024, 0) == (2, 2)
    assert size_state(MIXED, [5000, 100], PLAN.replace(state_bytes=10_200), 1024, 0) == (2, 2)
