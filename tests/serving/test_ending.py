from __future__ import annotations

import signal
from pathlib import Path

import pytest

from sartor.engine.request import Request
from sartor.graph import SamplingParams
from sartor.serving.ending import Blame, explain, oom_kills
from sartor.serving.quarantine import Quarantine


@pytest.mark.parametrize(
    ("code", "before", "after", "blame", "says"),
    [
        (1, 0, 0, "itself", "exit status 1"),
        (-signal.SIGSEGV, 0, 0, "itself", "SIGSEGV"),
        (-signal.SIGABRT, None, None, "itself", "SIGABRT"),
        (-signal.SIGTERM, 0, 5, "outside", "SIGTERM"),
        (-signal.SIGKILL, 3, 3, "outside", "from outside"),
        (-signal.SIGKILL, 3, 4, "memory", "out of memory"),
        (-signal.SIGKILL, None, None, "outside", "may be out of memory"),
    ],
)
def test_ends(code: int, before: int | None, after: int | None, blame: Blame, says: str) -> None:
    ending = explain(code, before, after)
    assert ending.blame == blame
    assert says in ending.cause


def test_the_kernels_count(tmp_path: Path) -> None:
    (tmp_path / "vmstat").write_text("nr_free_pages 12\noom_kill 7\noom_kill_x 9\n")
    assert oom_kills(str(tmp_path / "vmstat")) == 7
    (tmp_path / "vmstat").write_text("nr_free_pages 12\n")
    assert oom_kills(str(tmp_path / "vmstat")) is None
    assert oom_kills(str(tmp_path / "nothing")) is None


def request(name: str, *prompt: int, adapter: str = "", **params: float) -> Request:
    params_ = SamplingParams(**params)  # type: ignore[arg-type]
    return Request(name, prompt, params_, seed=hash(name) % 1000, adapter=adapter)


def test_the_very_same_request_is_refused_for_a_while() -> None:
    now = 100.0
    quarantine = Quarantine(60, lambda: now)
    assert quarantine.left("m", request("a", 1, 2)) == 0
    quarantine.add("m", request("a", 1, 2, temperature=0.5))
    now = 110.0
    assert quarantine.left("m", request("b", 1, 2, temperature=0.5)) == 50
    for other in (
        request("c", 1, 3, temperature=0.5),
        request("c", 1, 2, temperature=0.6),
        request("c", 1, 2, temperature=0.5, adapter="x"),
    ):
        assert quarantine.left("m", other) == 0
    assert quarantine.left("n", request("b", 1, 2, temperature=0.5)) == 0
    now = 161.0
    assert quarantine.left("m", request("b", 1, 2, temperature=0.5)) == 0


def test_the_latest_are_remembered() -> None:
    quarantine = Quarantine(60, lambda: 0.0)
    for i in range(300):
        quarantine.add("m", request("a", i))
    assert quarantine.left("m", request("b", 0)) == 0
    assert quarantine.left("m", request("b", 299)) == 60
