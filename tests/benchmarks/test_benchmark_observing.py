from __future__ import annotations

import observing
import pytest


def test_what_is_counted_costs_next_to_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    observing.main(["--rounds", "5"])
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "microseconds"
    costs = {line[:20].strip(): float(line[20:]) for line in lines}
    # About ten times what they are: machines that run tests do other things too.
    assert 0 < costs["a step"] < 15
    assert 0 < costs["a token"] < 15
    assert costs["a piece of a stream"] < 15
    assert 0 < costs["a request"] < 500
    assert {"its line in JSON", "its line in text", "a scrape"} <= costs.keys()
