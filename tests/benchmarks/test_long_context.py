"""The table of long prompts, on short ones."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import long_context
import pytest
from make_models import SHAPES


def test_it_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    long_context.main(["--lengths", "64,256", "--steps", "2", "--threads", "1", "--json", str(out)])
    rows = [long_context.Figures(**row) for row in json.loads(out.read_text())]
    shape = SHAPES[long_context.SHAPE]
    assert [row.tokens for row in rows] == [64, 256]
    for row in rows:
        # Whole blocks, and one for the tokens behind the prompt.
        held = long_context.kv_bytes(shape, "int8", row.tokens + 32)
        assert row.state_bytes == held == (row.tokens + 32) * 4 * 2 * 2 * (64 + 2)
        assert row.peak_bytes >= row.rest_bytes > row.scratch_bytes > 0
        assert 0 < row.attention_seconds < row.core_seconds
        assert 0 < row.decode_seconds < row.prefill_seconds
        assert row.attention_operations == 4 * 64 * 8 * 4 * row.tokens * (row.tokens + 1) / 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4 layers, 8 heads on 2, int8 state")
    assert [line.split("|")[1].strip() for line in lines[-2:]] == ["64", "256"]


def test_lengths() -> None:
    assert [long_context._length(text) for text in ("128k", "1000")] == [131072, 1000]


def test_a_process_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        next(long_context.measure(tmp_path / "none.gguf", [64], 1, "int8", 1))
