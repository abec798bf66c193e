"""The times of sampling, over a small vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
import sampling


def test_every_case_has_a_time_beside_the_floor(capsys: pytest.CaptureFixture[str]) -> None:
    sampling.main(["--vocab", "300,2000", "--rounds", "2"])
    title, sizes, floor, *cases = capsys.readouterr().out.splitlines()
    assert title.startswith("path ")
    assert sizes.split() == ["300", "2,000"]
    assert floor.startswith("floor")
    assert [line[:36].strip() for line in cases] == [case.name for case in sampling.CASES]
    for line in cases:
        small, large = map(float, line[36:].split())
        assert 0 <= small < 100
        assert 0 <= large < 100


@pytest.mark.parametrize("option", [["--vocab", "300,x"], ["--vocab", "0"], ["--rounds", "0"]])
def test_wrong_numbers(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sampling.main(option)
    assert "is not a whole number above 0" in capsys.readouterr().err


@pytest.mark.parametrize(("shape", "least", "most"), [("peaked", 2, 40), ("flat", 700, 990)])
def test_the_shapes_are_what_they_are_called(shape: str, least: int, most: int) -> None:
    case = sampling.Case("", sampling.PENALTIES, shape, 50)
    rows = sampling.make_rows(case, 1000, 3)
    assert rows.logits.shape == (3, 1000)
    assert list(np.diff(rows.history.starts)) == [50] * 3
    shares = np.sort(np.exp(rows.logits))[:, ::-1] / np.exp(rows.logits).sum(1, keepdims=True)
    needed = (np.cumsum(shares, 1) < 0.95).sum(1) + 1
    assert np.all((needed >= least) & (needed <= most))
