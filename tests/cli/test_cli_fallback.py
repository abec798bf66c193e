"""A model that only ``transformers`` knows, from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fallback_models import write_model
from sartor.cli.main import guarded


def test_run_marks_it_and_answers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_model(model, "gpt2")
    capsys.readouterr()
    code = guarded(["run", str(model), "hello", "--max-tokens", "6", "--temperature", "0"])
    out, err = capsys.readouterr()
    assert code == 0
    assert out.strip()
    first, *_, last = err.splitlines()
    assert first.startswith("note: GPT2LMHeadModel runs through transformers' own code: slower")
    assert last.startswith("prompt ")
