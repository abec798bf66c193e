"""What a soak asks and decides, and a short one on a backend that computes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from servers import Setting
from soak import Findings, Plan, Sample, soak, still_held
from soak_questions import Answer, bad_requests, make_questions
from tiny_model import write_tiny_model
from traffic import Prompts

PLAN = Plan(seconds=100, warm_up=10, kills=3, clients=4, seed=5)
PAGE = """
# TYPE sartor_requests_in_flight gauge
sartor_requests_in_flight{model="m"} %d
# TYPE sartor_engine_sequences gauge
sartor_engine_sequences{model="m",state="running"} 0
sartor_engine_sequences{model="m",state="waiting"} 0
# TYPE sartor_state_blocks gauge
sartor_state_blocks{model="m",group="0-paged",state="held"} %d
sartor_state_blocks{model="m",group="0-paged",state="cached"} 7
"""


def test_kills_are_drawn_by_the_seed_and_leave_time_afterwards() -> None:
    times = PLAN.kill_times()
    assert times == sorted(PLAN.kill_times())
    assert len(set(times)) == 3
    assert times[0] > 0
    assert times[-1] < 70
    assert Plan(100, 10, 3, 4, seed=6).kill_times() != times


def test_questions_are_the_same_for_a_seed() -> None:
    questions = make_questions("m", Prompts.common(), 40, 60, 3)
    assert questions == make_questions("m", Prompts.common(), 40, 60, 3)
    assert questions != make_questions("m", Prompts.common(), 40, 60, 4)
    for question in questions:
        assert question.body.get("temperature") == 0 or "seed" in question.body
    assert {question.body.get("n", 1) for question in questions} == {1, 2, 3}
    assert any("stop" in question.body for question in questions)
    assert b'"stream": true' in questions[0].bytes(True)
    assert b'"stream"' not in questions[0].bytes(False)


def test_an_answer_is_the_same_streamed_and_whole() -> None:
    streamed, whole = Answer(), Answer()
    for text, end in (("he", None), ("llo", "stop")):
        streamed.take({"choices": [{"index": 1, "delta": {"content": text}, "finish_reason": end}]})
    streamed.take({"choices": [], "usage": {"completion_tokens": 2}})
    choice = {"index": 1, "message": {"content": "hello"}, "finish_reason": "stop"}
    whole.take({"choices": [choice], "usage": {"completion_tokens": 2}})
    assert streamed == whole == Answer({1: "hello"}, {1: "stop"}, 2)
    assert Answer({1: "hel"}).begins(whole)
    assert not Answer({1: "hal"}).begins(whole)
    assert not Answer({0: "h"}).begins(whole)
    streamed.take({"error": {"message": "broken"}})
    assert "broken" in streamed.error
    assert not streamed.begins(whole)


def test_metrics_say_what_is_held() -> None:
    assert still_held(PAGE % (0, 0)) == {}
    held = still_held(PAGE % (2, 3))
    assert sorted(held.values()) == [2, 3]
    assert any("sartor_state_blocks" in name and "held" in name for name in held)
    assert "sartor_state_blocks" in still_held("# TYPE sartor_requests_in_flight gauge\n")


def findings(**fields: object) -> Findings:
    """One in which nothing is wrong."""
    rest = {
        role: Sample(1.0, role, pid, 100_000_000, 20, 5)
        for pid, role in enumerate(("gateway", "worker"))
    }
    usual = {
        "rests": [rest, rest],
        "held": {},
        "killed": [1.0, 2.0, 3.0],
        "workers": 1,
        "healthy": True,
    }
    return Findings(PLAN, **{**usual, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({}, set()),
        ({"failures": ["x"]}, {"answers"}),
        ({"killed": []}, {"kills"}),
        ({"workers": 2}, {"health"}),
        ({"tracebacks": 1}, {"log"}),
        ({"held": {"sartor_state_blocks": 1.0}}, {"ledger"}),
        ({"held": None}, {"ledger"}),
    ],
)
def test_what_is_wrong_is_found(fields: dict[str, object], wrong: set[str]) -> None:
    found = findings(**fields)
    assert {name for name, right, _ in found.checks() if not right} == wrong
    assert found.passed == (not wrong)
    assert any(line.startswith("WRONG") for line in found.lines()) == bool(wrong)
    assert found.to_json_dict()["passed"] == found.passed


@pytest.mark.parametrize(
    ("rss", "descriptors", "threads", "wrong"),
    [
        (102_900_000, 20, 5, set()),
        (90_000_000, 19, 4, set()),
        (103_100_000, 20, 5, {"worker's memory"}),
        (100_000_000, 21, 5, {"worker's descriptors"}),
        (100_000_000, 20, 6, {"worker's threads"}),
    ],
)
def test_growth_is_found(rss: int, descriptors: int, threads: int, wrong: set[str]) -> None:
    found = findings()
    last = {**found.rests[0], "worker": Sample(9.0, "worker", 7, rss, descriptors, threads)}
    found.rests[1] = last
    assert {name for name, right, _ in found.checks() if not right} == wrong


def test_bad_requests_have_an_answer_each() -> None:
    assert {bad.status for bad in bad_requests("m")} == {400, 404, 405}


def test_a_short_soak(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf")
    options = ["--backend", "null", "--device", "null-1ms", "--max-sequences", "8"]
    setting = Setting(model, 1, 1, 1, tmp_path, options)
    plan = Plan(seconds=12, warm_up=4, kills=2, clients=6, seed=1, longest=60, timeout=30)
    found = soak(setting, plan, Prompts.common())
    print("\n".join(found.lines()))
    # Memory of so short a run is for the long one to judge.
    wrong = {name for name, right, _ in found.checks() if not right and "memory" not in name}
    assert not wrong
    assert set(found.actions) == {"whole", "stream", "leave", "abort", "refused"}
    assert len({sample.pid for sample in found.series if sample.role == "worker"}) >= 3
