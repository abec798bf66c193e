"""The bench of starts, on a model of a few kilobytes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
import startup
from tiny_model import write_tiny_model


def test_it_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf")
    startup.main([str(model), "--runs", "1", "--json", str(tmp_path / "out.json")])
    found = startup.Startup(**json.loads((tmp_path / "out.json").read_text()))
    assert found.model == "tiny.gguf"
    assert 0 < found.load_seconds < found.ready_seconds
    assert 0 < found.host_seconds < found.step_seconds
    assert found.weights_bytes > 10_000
    assert found.state_bytes > 0
    assert found.overhead_bytes > 0
    shown = capsys.readouterr().out
    for line in ("load", "ready", "first token", "peak memory", "host work", "first start"):
        assert f"\n{line} " in shown
    without_pages = dataclasses.replace(found, anonymous_bytes=None)
    assert "anonymous" not in "\n".join(without_pages.lines())


def test_a_process_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        startup.measure(tmp_path / "none.gguf", 1, "x")
