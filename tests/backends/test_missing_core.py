"""Without its compiled core Sartor says so in one line, also where another backend takes over."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sartor.backends import registry
from sartor.cli.main import guarded

sys.path.append(str(Path(__file__).parents[1] / "serving"))
from tiny_model import write_tiny_model


@pytest.fixture
def no_core(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As after an installation for another Python: the module cannot be imported."""
    for name in [n for n in sys.modules if n.startswith("sartor.backends.cpu")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sartor.backends.cpu._native", None)
    import sartor.backends.cpu as package

    monkeypatch.delattr(package, "_native", raising=False)
    # Nor can torch, which would take over.
    for name in [n for n in sys.modules if n.startswith("sartor.backends.torch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    registry.load_backend.cache_clear()
    yield
    registry.load_backend.cache_clear()


def test_one_line_says_what_to_do(
    no_core: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf")
    assert guarded(["run", str(model), "hello", "--backend", "cpu"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.splitlines()[-1]
    assert line.startswith("error: ")
    assert "the native core of Sartor cannot be loaded (" in line
    assert "install Sartor again" in line


def test_what_runs_in_its_place_is_said(no_core: None, caplog: pytest.LogCaptureFixture) -> None:
    assert registry.choose()[0].name == "reference"
    (record,) = caplog.records
    assert "the native core of Sartor cannot be loaded (" in record.getMessage()
    assert record.getMessage().endswith("backend reference runs in its place, slowly")


def test_another_backend_runs_without_it(
    no_core: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf")
    plan = ("--backend", "reference", "--activation", "fp32", "--kv", "fp32")
    assert guarded(["run", str(model), "hello", "--max-tokens", "2", *plan]) == 0
    assert capsys.readouterr().out
