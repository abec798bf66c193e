"""What a comparison found: numbers, JSON, and the table of docs/performance.md."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rounds import Samples

from sartor.bench import Spread
from sartor.bench.ceiling import PhaseWork, phase_ceiling
from sartor.hardware import Ceilings, inventory

OWN = "sartor"
HEADING = """\
# Performance

Written by `python benchmarks/compare.py`; [benchmarks/README.md](../benchmarks/README.md) says what
is measured and how. Tokens a second: the median, and the least and the most of all rounds. Behind a
peer's numbers: how many times as fast Sartor was, the median of the ratios of each round, and
their extremes. The engines took turns in one run on the same weights and prompts.
"""


def where_and_when() -> dict[str, str]:
    """What every section says: the machine, and the date."""
    machine = inventory()
    return {
        "machine": f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB, "
        f"{machine.system}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


@dataclass(frozen=True)
class Cell:
    """One engine in one row: tokens a second; ``ratio``: of Sartor's rate to this, by round."""

    rate: Spread
    ratio: Spread | None

    def to_json_dict(self) -> dict[str, float]:
        found = {"tps": self.rate.median, "tps_min": self.rate.low, "tps_max": self.rate.high}
        if self.ratio is not None:
            found |= {
                "sartor_times": self.ratio.median,
                "sartor_times_min": self.ratio.low,
                "sartor_times_max": self.ratio.high,
            }
        return found


@dataclass(frozen=True)
class Limits:
    """What the machine can do, and what each row asks of it."""

    ceilings: Ceilings
    work: Mapping[str, PhaseWork]

    def rate(self, row: str) -> float:
        """Tokens a second of a machine that only reads weights and state, or only multiplies."""
        return phase_ceiling(self.work[row], self.ceilings).tokens_per_s

    def to_json_dict(self) -> dict[str, Any]:
        rows = {row: dataclasses.asdict(phase) for row, phase in self.work.items()}
        return {**self.ceilings.to_json_dict(), "work": rows}

    def __str__(self) -> str:
        int8 = self.ceilings.int8
        text = f"{self.ceilings.read_bytes_per_s / 1e9:.1f} GB/s of reads, "
        text += f"{int8.ops_per_s / 1e12:.2f} int8 TOPS"
        if int8.share_of_width is None:
            return text
        return (
            f"{text} ({int8.ops_per_cycle:.0f} operations a cycle and core, "
            f"{int8.share_of_width:.0%} of the issue width, at {int8.clock_hz / 1e9:.2f} GHz)"
        )


def cells(rates: Mapping[str, Sequence[float]]) -> dict[str, Cell]:
    """The engines of one row."""
    own = rates.get(OWN)
    return {
        name: Cell(
            Spread.of(values),
            None
            if own is None or name == OWN
            else Spread.of([a / b for a, b in zip(own, values, strict=True)]),
        )
        for name, values in rates.items()
    }


@dataclass(frozen=True)
class Comparison:
    """``engines``: title, version and settings by name, in the table's order; ``missing``: why
    others are not in it; ``facts``: machine, model and whatever else there is to tell."""

    model: str
    facts: Mapping[str, Any]
    engines: Mapping[str, Mapping[str, Any]]
    missing: Mapping[str, str]
    samples: Samples
    limits: Limits | None

    def to_json_dict(self) -> dict[str, Any]:
        rows = {}
        for row, rates in self.samples.rates.items():
            found: dict[str, Any] = {n: c.to_json_dict() for n, c in cells(rates).items()}
            for name, cell in found.items():
                cell["rounds_tps"] = rates[name]
            found |= {name: {"failed": why} for name, why in self.samples.failed[row].items()}
            if self.limits is not None and OWN in rates:
                share = statistics.median(rates[OWN]) / self.limits.rate(row)
                found[OWN]["share_of_ceiling"] = share
            rows[row] = found
        return {
            "model": self.model,
            **self.facts,
            "engines": {name: dict(facts) for name, facts in self.engines.items()},
            "missing": dict(self.missing),
            "ceilings": None if self.limits is None else self.limits.to_json_dict(),
            "rows": rows,
        }

    def to_markdown(self) -> str:
        """One section: the table, then what was measured and on what."""
        names = list(self.engines)
        titles = [str(self.engines[name]["title"]) for name in names]
        lines = [
            f"## {self.model}",
            "",
            "| | " + " | ".join(titles) + " |",
            "| --- |" + " --- |" * len(names),
        ]
        for row, rates in self.samples.rates.items():
            found = cells(rates)
            shown = [
                self._cell(row, name, found[name]) if name in found else "failed" for name in names
            ]
            lines.append(f"| {title(row)} | " + " | ".join(shown) + " |")
        lines += ["", *self._notes()]
        return "\n".join(lines) + "\n"

    def _cell(self, row: str, name: str, cell: Cell) -> str:
        text = f"{_number(cell.rate.median)} ({_number(cell.rate.low)}-{_number(cell.rate.high)})"
        if name == OWN and self.limits is not None:
            text += f", {cell.rate.median / self.limits.rate(row):.0%} of the ceiling"
        if cell.ratio is not None:
            r = cell.ratio
            text += f", **x{r.median:.2f}** ({r.low:.2f}-{r.high:.2f})"
        return text

    def _notes(self) -> list[str]:
        notes = [f"- {key.replace('_', ' ')}: {value}" for key, value in self.facts.items()]
        if self.limits is not None:
            notes.append(f"- ceilings in this run: {self.limits}")
        notes += [
            f"- {facts['title']}: {facts['version']}; {facts['settings']}"
            for facts in self.engines.values()
        ]
        notes += [f"- not measured, {name}: {why}" for name, why in self.missing.items()]
        reasons = {
            f"- failed, {name} in {title(row)}: {why}"
            for row, failed in self.samples.failed.items()
            for name, why in failed.items()
        }
        return notes + sorted(reasons)


def title(row: str) -> str:
    """A row's name for people."""
    kind, _, count = row.partition("_")
    return {"prompt": f"prompt of {count}", "batch": f"decode, {count} sequences"}.get(
        kind, "decode, one sequence"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def with_section(document: str, section: str) -> str:
    """A document in which this section replaces the one of the same heading, or comes last."""
    parts = (document.strip() or HEADING.strip()).split("\n## ")
    heading = section.split("\n", 1)[0].removeprefix("## ")
    body = section.strip().removeprefix("## ")
    for i, part in enumerate(parts[1:], 1):
        if part.split("\n", 1)[0] == heading:
            parts[i] = body
            break
    else:
        parts.append(body)
    return "\n\n## ".join(part.strip() for part in parts) + "\n"


def write_section(path: Path, section: str) -> None:
    """As :func:`with_section`, in a file that need not be there; as a whole or not at all."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    part = path.with_name(f"{path.name}.part")
    part.write_text(with_section(old, section), encoding="utf-8")
    os.replace(part, path)
