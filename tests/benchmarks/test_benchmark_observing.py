from __future__ import annotations

import observing
import pytest


def test_what_is_counted_costs_next_to_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    observing.main(["--rounds", "5"])
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "microseconds"
    costs = {line[:20].strip(): float(line[20:]) for line in lines}
    assert 0 < costs["a step"] < 5
    assert 0 < costs["a token"] < 10
    assert costs["a piece of a stream"] < 5
    assert 0 < costs["a request"] < 500
    assert {"its line in JSON", "its line in text", "a scrape"} <= costs.keys()
