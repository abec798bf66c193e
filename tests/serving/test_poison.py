"""A request that workers die of, among eight that are innocent."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from poison_backend import installed
from reading import Choice, Reading
from server_process import ServerProcess, wait_until

EIGHT = [
    {"prompt": f"innocent {i}", "seed": i, "max_tokens": 100, "n": 1 + i % 2} for i in range(8)
]
SAYS = {
    "RAISE!": "this prompt cannot be computed",
    "ABORT!": "died twice while it ran this request alone (the worker was killed by signal SIGABRT)",
    "FAULT!": "died twice while it ran this request alone (the worker was killed by signal SIGSEGV)",
    "STUCK!": "died twice while it ran this request alone (the worker was stuck in one step",
}


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """2 s in one step are a hang; whoever was given up is refused for 3 s."""
    with ServerProcess(
        [tiny_model],
        backend="poison",
        device="null-20ms",
        timing={"hang": 2.0, "beat": 0.2, "quarantine": 3.0},
        environment=installed(tmp_path_factory.mktemp("site")),
    ) as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(server: ServerProcess) -> list[tuple[dict[int, Choice], int]]:
    return [reading.whole() for reading in [Reading(server, **body) for body in EIGHT]]


@pytest.mark.parametrize("word", SAYS)
def test_poison_is_found_and_the_innocent_finish(
    server: ServerProcess, undisturbed: list[tuple[dict[int, Choice], int]], word: str
) -> None:
    readings = [Reading(server, **body) for body in EIGHT]
    wait_until(lambda: all(reading.pieces > 3 for reading in readings))
    poison = Reading(server, prompt=f"good, then {word}", temperature=0)
    poison.join(60)
    told = time.monotonic()
    assert SAYS[word] in str(poison.problem)
    assert [reading.whole() for reading in readings] == undisturbed
    server.wait_healthy(30)
    worker = server.worker()

    again = Reading(server, prompt=f"good, then {word}", temperature=0)
    again.join(20)
    if time.monotonic() - told < 3:  # a slow machine may take longer to get here
        assert "request_given_up" in str(again.problem)
        assert server.worker() == worker
    else:
        assert again.problem is not None
    assert Reading(server, prompt="good, then harmless").whole()[1] == 40


def test_a_fault_that_is_not_the_requests_is_survived(
    server: ServerProcess, undisturbed: list[tuple[dict[int, Choice], int]]
) -> None:
    """Once is bad luck: all go on."""
    readings = [Reading(server, **body) for body in EIGHT]
    wait_until(lambda: all(reading.pieces > 3 for reading in readings))
    server.worker().send_signal(signal.SIGSEGV)
    assert [reading.whole() for reading in readings] == undisturbed
