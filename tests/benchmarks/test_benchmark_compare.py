"""The command as a whole, with Sartor alone, and its options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import compare
import pytest
from compare import find_limits, parse
from tiny_model import write_tiny_model

from sartor.errors import UsageError
from sartor.hardware import Ceilings, Peak


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny.gguf")


def test_options(model: Path) -> None:
    found = parse([str(model), "--peers", "llama_cpp, transformers", "--batches", "16,4,4"])
    assert found.peers == ("llama_cpp", "transformers")
    assert (found.batches, found.rounds, found.title) == ((4, 16), 5, "tiny")
    assert parse([str(model), "--batches", ""]).batches == ()


def test_a_plan_has_a_title_of_its_own(model: Path) -> None:
    assert parse([str(model)]).plan == {}
    found = parse([str(model), "--plan", "head_bits=4", "--plan", "kv=fp16"])
    assert found.plan == {"head_bits": 4, "kv": "fp16"}
    assert found.title == "tiny, head_bits=4, kv=fp16"
    named = parse([str(model), "--plan", "head_bits=4", "--title", "head in 4 bits"])
    assert named.title == "head in 4 bits"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "lama"], "no peer is called lama"),
        (["--batches", "4,x"], "is no list of numbers"),
        (["--batches", "0"], "must be at least 1"),
        (["--rounds", "0"], "must be at least 1"),
        (["--plan", "head_bits=9"], "head_bits is 9"),
        (["--plan", "head_bits"], "head_bits is ''"),
        (["--plan", "head=4"], "unknown field head"),
        (["--plan", "threads=4"], "the comparison sets threads"),
    ],
)
def test_wrong_options(model: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse([str(model), *arguments])


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no file"):
        parse([str(tmp_path / "none.gguf")])


class _Asked:
    """An engine that knows its work."""

    def ask(self, command: str, **fields: object) -> dict[str, Any]:
        assert (command, fields) == ("work", {"batches": [4]})
        return {"decode": {"tokens": 2, "work": {"bytes": 10.0, "operations": {"int8": 6.0}}}}

    def close(self) -> None:
        raise AssertionError


def test_limits_are_the_better_of_what_was_measured() -> None:
    def ceilings(read: float, int8: float, bf16: float) -> Ceilings:
        half = Peak(bf16, 1e9, 64, 1) if bf16 else None
        return Ceilings(read, Peak(int8, 1e9, 64, 1), Peak(3.0, 1e9, 64, 1), half, 2, "amx")

    found = find_limits(_Asked(), [4], [ceilings(5, 9, 0), None, ceilings(6, 8, 2)])
    assert found is not None
    assert found.ceilings == ceilings(6, 9, 2)
    assert found.rate("decode") == pytest.approx(2 / (10 / 6))
    assert find_limits(_Asked(), [4], [None]) is None


def test_sartor_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both ends of the protocol; a peer that is not installed is named with the reason."""
    monkeypatch.setenv("SARTOR_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(compare, "CEILING_SECONDS", 0.02)
    table, numbers = tmp_path / "performance.md", tmp_path / "found.json"
    arguments = [str(model), "--peers", "llama_cpp", "--rounds", "1", "--batches", "2"]
    arguments += ["--environments", str(tmp_path / "environments"), "--json", str(numbers)]
    options = parse([*arguments, "--write", str(table)])
    compare.save(compare.compare(options), options)
    found = json.loads(numbers.read_text())
    assert set(found["rows"]) == {"prompt_512", "decode", "batch_2"}
    for row in found["rows"].values():
        assert len(row["sartor"]["rounds_tps"]) == 1
        assert row["sartor"]["tps"] > 0
        assert row["sartor"]["share_of_ceiling"] > 0
    assert "not installed" in found["missing"]["llama_cpp"]
    assert found["bits_per_weight"] > 0
    assert capsys.readouterr().out in table.read_text()
    assert "mean_kl" not in found
    options = parse([*arguments, "--write", str(table), "--plan", "head_bits=4"])
    compare.save(compare.compare(options), options)
    fewer = json.loads(numbers.read_text())
    assert fewer["engines"]["sartor"]["settings"].endswith("head_bits=4")
    read = [run["ceilings"]["work"]["decode"]["work"]["bytes"] for run in (found, fewer)]
    assert read[1] < read[0]
    assert fewer["mean_kl"] > fewer["usual_mean_kl"] >= 0
    text = table.read_text()
    assert text.index("## tiny\n") < text.index("## tiny, head_bits=4\n")
    assert f"- mean kl: {fewer['mean_kl']}" in text
