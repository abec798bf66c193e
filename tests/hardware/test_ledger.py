from __future__ import annotations

import pytest

from sartor.errors import CapacityError
from sartor.hardware import Lease, MemoryLedger


def test_leases_add_up_and_can_be_given_back() -> None:
    ledger = MemoryLedger(100)
    ledger.lease("a", "weights", 40)
    ledger.lease("b", "weights", 30)
    ledger.lease("a", "state", 20)
    assert (ledger.used, ledger.free) == (90, 10)
    ledger.release("a")
    assert (ledger.used, ledger.free) == (30, 70)
    assert ledger.leases == (Lease("b", "weights", 30),)


def test_a_lease_takes_the_place_of_the_one_before() -> None:
    ledger = MemoryLedger(100)
    ledger.lease("a", "weights", 90)
    ledger.lease("a", "weights", 100)
    ledger.lease("a", "weights", 10)
    assert ledger.used == 10


def test_what_does_not_fit_says_who_holds_what_and_changes_nothing() -> None:
    ledger = MemoryLedger(100_000_000)
    ledger.lease("a", "weights", 60_000_000)
    with pytest.raises(
        CapacityError, match=r"b: 50 MB of state .* limit of 100 MB.* a weights 60 MB"
    ):
        ledger.lease("b", "state", 50_000_000)
    assert ledger.used == 60_000_000


def test_without_a_limit_everything_is_counted_and_fits() -> None:
    ledger = MemoryLedger()
    ledger.lease("a", "weights", 1 << 60)
    assert ledger.free is None
    assert ledger.used == 1 << 60
