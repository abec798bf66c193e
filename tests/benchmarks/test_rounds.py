"""Who is measured when, and what counts."""

from __future__ import annotations

import itertools

import pytest
from engines import Answer, EngineError, EngineLost
from rounds import Workload, run_rounds, turns

from sartor.errors import SartorError

Log = list[tuple[str, str, int]]
DECODE = [Workload(0)]


class FakeEngine:
    """Takes 1, 2, 3, ... seconds; ``fails`` maps a number of requests to what the next raises."""

    def __init__(self, name: str, log: Log, fails: dict[int, EngineError] | None = None) -> None:
        self.name, self.log, self.fails = name, log, fails or {}
        self.asked: list[dict[str, object]] = []

    def ask(self, command: str, **fields: object) -> Answer:
        self.log.append((self.name, command, int(str(fields["seed"]))))
        self.asked.append(fields)
        if len(self.asked) - 1 in self.fails:
            raise self.fails[len(self.asked) - 1]
        seconds = float(len(self.asked))
        return {"prompt_seconds": seconds, "decode_seconds": 2 * seconds}

    def close(self) -> None: ...


def prompts(seed: int, length: int) -> list[int]:
    return [seed] * length


def test_rounds_rotate_and_the_first_does_not_count() -> None:
    log: Log = []
    engines = {name: FakeEngine(name, log) for name in "abc"}
    samples = run_rounds(engines, DECODE, 3, prompts, pause=0)
    assert [name for name, _, _ in log] == [*"abc", *"bca", *"cab", *"abc"]
    assert [seed for _, _, seed in log] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    for name in "abc":
        assert samples.rates["prompt_512"][name] == pytest.approx([512 / 2, 512 / 3, 512 / 4])
        assert samples.rates["decode"][name] == pytest.approx([64 / 4, 64 / 6, 64 / 8])
    assert not any(samples.failed.values())


def test_all_get_the_same_prompts() -> None:
    log: Log = []
    engines = {name: FakeEngine(name, log) for name in "ab"}
    samples = run_rounds(engines, [Workload(0), Workload(3)], 1, prompts, pause=0)
    assert engines["a"].asked == engines["b"].asked
    single, batch = engines["a"].asked[1], engines["a"].asked[3]
    assert single == {"seed": 1, "prompt": [1] * 512, "steps": 64}
    assert batch == {"seed": 1, "prompts": [[seed] * 128 for seed in (1, 2, 3)], "steps": 32}
    assert samples.rates["batch_3"]["a"] == pytest.approx([3 * 32 / 8])


def test_a_failure_leaves_out_one_workload_and_says_why() -> None:
    log: Log = []
    bad = FakeEngine("b", log, {1: EngineError("too large")})
    engines = {"a": FakeEngine("a", log), "b": bad}
    samples = run_rounds(engines, [Workload(2), Workload(4)], 2, prompts, pause=0)
    assert list(samples.rates["batch_2"]) == ["a"]
    assert samples.failed["batch_2"] == {"b": "too large"}
    assert set(samples.rates["batch_4"]) == {"a", "b"}
    assert samples.failed["batch_4"] == {}


def test_a_lost_engine_is_told_in_every_later_row() -> None:
    log: Log = []
    bad = FakeEngine("b", log, {3: EngineLost("it died")})
    engines = {"a": FakeEngine("a", log), "b": bad}
    workloads = [Workload(2), Workload(4), Workload(8)]
    samples = run_rounds(engines, workloads, 1, prompts, pause=0)
    assert set(samples.rates["batch_2"]) == {"a", "b"}
    assert [samples.failed[f"batch_{n}"] for n in (2, 4, 8)] == [
        {},
        {"b": "it died"},
        {"b": "it died"},
    ]
    assert len(bad.asked) == 4


def test_nothing_measured_is_an_error() -> None:
    engine = FakeEngine("a", [], {0: EngineError("no luck")})
    with pytest.raises(SartorError, match="a: no luck"):
        run_rounds({"a": engine}, DECODE, 1, prompts, pause=0)


def test_turns_of_none_and_one() -> None:
    assert list(turns([])) == []
    assert list(itertools.islice(turns(["a"]), 2)) == [["a"], ["a"]]
