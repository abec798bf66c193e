"""A load leaves Python's garbage collector as it found it, also when it fails."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from sartor.engine.load import load
from sartor.errors import UsageError
from sartor.plan import ExecutionPlan


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_is_as_before(
    was_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    during = []

    def opened(path: Path) -> None:
        during.append(gc.isenabled())
        raise UsageError(f"{path}: stop here")

    monkeypatch.setattr("sartor.formats.open_checkpoint", opened)
    before = gc.isenabled()
    (gc.enable if was_on else gc.disable)()
    try:
        with pytest.raises(UsageError, match="stop here"):
            load(tmp_path, ExecutionPlan(), "name", None)
        assert gc.isenabled() is was_on
    finally:
        (gc.enable if before else gc.disable)()
    assert during == [False]
