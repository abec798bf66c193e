"""Requests beside each other: a whole run, and what is made of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import interference
import pytest
from interference import Findings, Trial
from load_report import Outcome
from servers import SERVERS, Launch, Setting
from tiny_model import write_tiny_model
from traffic import Prompts

from sartor.errors import UsageError


def test_gaps_count_where_they_end() -> None:
    outcomes = [
        Outcome(0.0, 9, [1.0, 2.0, 2.5, 4.0], [1] * 4),
        Outcome(0.0, 9, [1.9, 3.0], [1, 2]),
    ]
    found = interference.gaps_within(outcomes, 2.0, 4.0)
    assert found == pytest.approx([1.0, 0.5, 0.55, 0.55]), "a piece of two tokens took two steps"


def test_the_section_says_it_all() -> None:
    found = Findings("m", "Sartor", "as installed", 2, 6000, 64)
    found.beside = [Trial(0.02, 0.03, 0.04, 9.0), Trial(0.02, 0.03, 0.05, 11.0)]
    found.control = [Trial(0.02, 0.02, 0.03, 9.0), Trial(0.02, 0.02, 0.03, 11.0)]
    found.alone = [4.0, 6.0]
    found.first, found.again = [1.0, 2.0], [0.1, 0.1]
    found.together_last, found.together_computed = 3.0, 5000
    text = found.to_markdown()
    assert "| x2.25 (x2.00-x2.50) | x1.50 (x1.50-x1.50) |" in text
    assert "first token came after 10.00 (9.00-11.00) s; by itself, after 5.00" in text
    assert "7.5% (5.0%-10.0%) of that" in text
    assert "5,000 tokens of prompts were computed (the least is 4,048" in text


def test_a_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def launch(setting: Setting, port: int) -> Launch:
        """Slow steps: tokens seldom arrive together."""
        command = [sys.executable, "-m", "sartor.cli.main", "serve", str(setting.model)]
        command += ["--port", str(port), "--backend", "reference"]
        return Launch("Sartor", "slow", command, str(setting.model))

    monkeypatch.setitem(SERVERS, "sartor", launch)
    model = write_tiny_model(tmp_path / "tiny.gguf")
    monkeypatch.setattr(Prompts, "of_model", staticmethod(lambda path, endpoint: Prompts.common()))
    smaller = {
        "STREAMS": 3,
        "STREAM_OUTPUT": 1000,
        "WARM_SECONDS": 0.01,
        "BEFORE_SECONDS": 0.2,
        "PREFIX": 64,
        "SUFFIX": 8,
        "TOGETHER": 5,
        "REPEATS": 2,
    }
    for name, value in smaller.items():
        monkeypatch.setattr(interference, name, value)
    out = tmp_path / "out.json"
    arguments = [str(model), "--trials", "1", "--tokens", "200", "--answered", "4"]
    arguments += ["--environments", str(tmp_path), "--json", str(out)]
    monkeypatch.setattr("sys.argv", ["interference.py", *arguments])
    assert interference.main() == 0
    found = json.loads(out.read_text())
    (beside,), (control,) = found["beside"], found["control"]
    assert control["seconds"] == beside["seconds"] > 0
    assert 0 < control["before"] <= control["p99"]
    assert found["alone"][0] > 0
    assert len(found["first"]) == len(found["again"]) == 2
    # A word is several tokens of this model: the prefix was computed once, not five times.
    assert 64 < found["together_computed"] < 2 * (64 * 8 + 5 * 8 * 8)
    assert "3 answers to prompts of 4 tokens, and a prompt of 200 that" in capsys.readouterr().out


def test_options(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    model.touch()
    options = interference.parse([str(model), "--server", "llama_server", "--option=-fa off"])
    assert (options.server, options.more) == ("llama_server", ("-fa", "off"))
    for wrong in (["--parts", "x"], ["--trials", "0"], ["--tokens", "1"], ["--answered", "0"]):
        with pytest.raises(UsageError):
            interference.parse([str(model), *wrong])
    with pytest.raises(UsageError, match="no file"):
        interference.parse([str(tmp_path / "no.gguf")])
