"""Engines in processes of their own: every request is answered, or says why not."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from engines import DRIVERS, EngineError, EngineLost, EngineProcess
from peers import PEERS

FAKE = Path(__file__).with_name("fake_driver.py")


@contextmanager
def fake(tmp_path: Path, timeout: float = 30) -> Iterator[EngineProcess]:
    command = [sys.executable, str(FAKE)]
    with EngineProcess(command, tmp_path / "logs" / "fake.log", timeout) as engine:
        yield engine


def load(engine: EngineProcess, model: str = "any") -> dict[str, object]:
    return engine.ask("load", model=model, folder="", threads=2, sequences=4, context=577)


def test_a_driver_does_what_it_is_asked_in_order(tmp_path: Path) -> None:
    with fake(tmp_path) as engine:
        assert load(engine)["settings"] == "2 threads"
        single = engine.ask("single", seed=0, prompt=[1, 2, 3], steps=2)
        batch = engine.ask("batch", seed=0, prompts=[[1, 2], [3, 4]], steps=1)
        assert engine.ask("ceilings", seconds=0.1)["calls"] == [
            *("prepare 1", "start [3]", "step", "step", "end"),
            *("prepare 2", "start [2, 2]", "step", "end"),
        ]
    assert set(single) == {"prompt_seconds", "decode_seconds"}
    assert set(batch) == {"decode_seconds"}
    assert "noise below Python" in (tmp_path / "logs" / "fake.log").read_text()


def test_an_error_is_told_and_the_engine_goes_on(tmp_path: Path) -> None:
    with fake(tmp_path) as engine:
        with pytest.raises(EngineError, match="ValueError: no such model"):
            load(engine, "fails")
        with pytest.raises(EngineError, match="no command is called 'sing'"):
            engine.ask("sing")
        assert load(engine)["version"] == "1"


def test_a_death_is_told_with_the_last_words(tmp_path: Path) -> None:
    with fake(tmp_path) as engine:
        with pytest.raises(EngineLost, match="code 3: out of luck"):
            load(engine, "dies")
        with pytest.raises(EngineLost, match="code 3"):
            load(engine)


def test_silence_has_an_end(tmp_path: Path) -> None:
    with fake(tmp_path, timeout=1) as engine:
        started = time.monotonic()
        with pytest.raises(EngineLost, match="no answer to load within 1 s"):
            load(engine, "hangs")
    assert time.monotonic() - started < 30


def test_every_peer_has_a_driver() -> None:
    found = {path.stem.removeprefix("run_") for path in DRIVERS.glob("run_*.py")}
    assert found == {"sartor", *PEERS}
