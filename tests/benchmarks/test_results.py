"""Ratios, ceilings, the table and the document it goes to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from results import HEADING, Comparison, Limits, cells, title, with_section, write_section
from rounds import Samples

from sartor.bench import Spread
from sartor.bench.ceiling import PhaseWork
from sartor.hardware import Ceilings, Peak, Work

LIMITS = Limits(
    Ceilings(1e9, Peak(1e11, 1e9, 128, 1), Peak(1e10, 1e9, 32, 1), None, 1, "avx2"),
    {
        "prompt_512": PhaseWork(512, Work(5e7, {"int8": 2 * (512 * 8e7 + 1e7)})),
        "decode": PhaseWork(64, Work(64 * 5e7, {"int8": 64 * 2 * 9e7})),
    },
)
COMPARISON = Comparison(
    model="toy",
    facts={"machine": "a chip", "bits_per_weight": 4.5},
    engines={
        "sartor": {"title": "Sartor", "version": "1", "settings": "int8"},
        "other": {"title": "Other", "version": "2", "settings": "bf16"},
    },
    missing={"third": "not installed"},
    samples=Samples(
        rates={
            "prompt_512": {"sartor": [200.0, 300.0, 400.0], "other": [100.0, 300.0, 100.0]},
            "decode": {"sartor": [10.0, 10.0, 11.0]},
        },
        failed={"prompt_512": {}, "decode": {"other": "too large"}},
    ),
    limits=LIMITS,
)


def test_the_ratio_is_that_of_each_round() -> None:
    found = cells({"sartor": [2.0, 9.0, 8.0], "other": [1.0, 3.0, 8.0]})
    assert found["sartor"].ratio is None
    # Not 8 / 3, the ratio of the medians.
    assert found["other"].ratio == Spread(2.0, 1.0, 3.0)
    assert found["other"].rate == Spread(3.0, 1.0, 8.0)


def test_without_sartor_there_is_no_ratio() -> None:
    assert cells({"other": [1.0]})["other"].ratio is None


def test_ceilings_follow_what_binds() -> None:
    assert LIMITS.rate("decode") == pytest.approx(20)  # 50 MB at 1 GB/s
    assert LIMITS.rate("prompt_512") == pytest.approx(512 / (2 * (512 * 8e7 + 1e7) / 1e11))


def test_json_has_every_round_and_reason() -> None:
    found = json.loads(json.dumps(COMPARISON.to_json_dict()))
    other = found["rows"]["prompt_512"]["other"]
    assert other["rounds_tps"] == [100.0, 300.0, 100.0]
    assert other["sartor_times"] == 2.0
    assert (other["sartor_times_min"], other["sartor_times_max"]) == (1.0, 4.0)
    assert found["rows"]["decode"]["other"] == {"failed": "too large"}
    assert found["rows"]["decode"]["sartor"]["share_of_ceiling"] == pytest.approx(0.5)
    assert found["missing"] == {"third": "not installed"}
    assert found["ceilings"]["int8"]["share_of_width"] == pytest.approx(100 / 128)
    assert found["ceilings"]["work"]["decode"]["tokens"] == 64


def test_table_shows_numbers_and_reasons() -> None:
    text = COMPARISON.to_markdown()
    assert text.startswith("## toy\n\n| | Sartor | Other |\n| --- | --- | --- |\n")
    assert "| prompt of 512 | 300 (200-400), 48% of the ceiling | 100 (100-300), **x2.00**" in text
    assert "| decode, one sequence | 10.0 (10.0-11.0), 50% of the ceiling | failed |" in text
    assert "- not measured, third: not installed" in text
    assert "- failed, other in decode, one sequence: too large" in text
    assert "- Other: 2; bf16" in text
    assert (
        "- ceilings in this run: 1.0 GB/s of reads, 0.10 int8 TOPS (100 operations a cycle and "
        "core, 78% of the issue width, at 1.00 GHz)" in text
    )


def test_titles_of_rows() -> None:
    assert [title(row) for row in ("prompt_512", "decode", "batch_16")] == [
        *("prompt of 512", "decode, one sequence", "decode, 16 sequences"),
    ]


def test_a_section_replaces_its_own_and_no_other() -> None:
    document = with_section("", "## one\n\nfirst\n")
    assert document.startswith(HEADING)
    document = with_section(document, "## two\n\nsecond\n")
    document = with_section(document, "## one\n\nagain\n")
    assert document == f"{HEADING}\n## one\n\nagain\n\n## two\n\nsecond\n"


def test_a_section_is_written_into_a_file(tmp_path: Path) -> None:
    target = tmp_path / "doc.md"
    write_section(target, "## One\n\na\n")
    write_section(target, "## Two\n\nb\n")
    write_section(target, "## One\n\nc\n")
    text = target.read_text(encoding="utf-8")
    assert "\na\n" not in text
    assert text.index("## One\n\nc") < text.index("## Two\n\nb")
    assert [path.name for path in tmp_path.iterdir()] == ["doc.md"]
