"""The machine as the system tells it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from sartor.hardware import inventory, memory


def test_memory_is_what_the_system_says() -> None:
    total, available = memory()
    found = psutil.virtual_memory()
    assert total == found.total
    assert abs(available - found.available) < total / 4  # others are at work, too
    assert 0 < available <= total


@pytest.mark.parametrize("content", [None, "", "MemTotal: many kB\n", "MemTotal:\n"])
def test_memory_without_a_file_that_tells(
    monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    def read_text(path: Path, encoding: str) -> str:
        if content is None:
            raise FileNotFoundError(path)
        return content

    expected = psutil.virtual_memory().total
    monkeypatch.setattr(Path, "read_text", read_text)
    assert memory()[0] == expected


def test_inventory() -> None:
    machine = inventory()
    assert machine.cores >= 1
    assert machine.cpu
    assert 0 < machine.available_bytes <= machine.memory_bytes
