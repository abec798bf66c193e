"""fuzz_gguf.py: some hundred inputs, and a minute of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fuzz_gguf
import pytest

SECONDS = 60


def test_a_short_search_finds_nothing() -> None:
    runs, kept = fuzz_gguf.search(60, seed=1, most=200)
    assert runs > 50
    assert kept > len(list(fuzz_gguf.CORPUS.iterdir()))


def test_the_search_sees_where_an_input_leads(tmp_path: Path) -> None:
    nothing = fuzz_gguf.edges_of(b"nope", tmp_path / "m.gguf")
    sound = max((f.read_bytes() for f in fuzz_gguf.CORPUS.iterdir()), key=len)
    assert len(fuzz_gguf.edges_of(sound, tmp_path / "m.gguf")) > len(nothing) > 0


@pytest.mark.long
def test_a_long_search_finds_nothing() -> None:
    command = [sys.executable, fuzz_gguf.__file__, "--seconds", str(SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-8000:]
