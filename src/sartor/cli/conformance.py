"""``sartor conformance``: the operator matrix of the backends."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sartor.cli import options
from sartor.cli.screen import print_json, print_table, say
from sartor.progress import Progress, showing
from sartor.progress.line import ProgressLine

if TYPE_CHECKING:
    from sartor.backends.conformance import Report, Result
    from sartor.backends.speed import Speed


def conformance(
    backend: Annotated[
        str, typer.Option(help="Backend name; auto takes all that have a device here.")
    ] = "auto",
    isa: options.Isa = "auto",
    json: options.Json = False,
    every: Annotated[
        bool, typer.Option("--all", help="Show every case, not only a line an operator.")
    ] = False,
    wrong: Annotated[bool, typer.Option("--wrong", help="Show only what is wrong.")] = False,
    speed: Annotated[
        bool, typer.Option("--speed", help="Time the weight formats, beside the ceiling.")
    ] = False,
) -> int:
    """Hold the operators of backends to the reference.

    Exit code 1 where anything is wrong.
    """
    progress = ProgressLine()
    reports, unavailable = _run(backend, isa, progress)
    speeds = _speeds(backend, isa, progress) if speed else []
    failures = [(r.backend, result) for r in reports for result in r.results if not result.right]
    if json:
        found = _json(reports, unavailable, only_wrong=wrong)
        if speed:
            found["speed"] = [dataclasses.asdict(one) for one in speeds]
        print_json(found)
        return 1 if failures else 0
    if not wrong:
        tables = [_every(reports)] if every else [_summary(report) for report in reports]
        if len(reports) > 1 and not every:
            tables = [_matrix(reports)]
        for table in tables:
            print_table(table)
    if speeds:
        print()
        print_table(_speed_table(speeds))
    if failures:
        if not wrong:
            print()
        print_table([["BACKEND", *_CASE], *([name, *_case(result)] for name, result in failures)])
    for report in reports:
        say(_line(report))
    for name, reason in unavailable.items():
        say(f"{name}: not tried ({reason})")
    return 1 if failures else 0


def _run(backend: str, isa: str, progress: Progress) -> tuple[list[Report], dict[str, str]]:
    """One backend, which then has to be there; or all, and why some are not."""
    from sartor.backends.conformance import WITHOUT_ARITHMETIC, run
    from sartor.backends.registry import backend_names, load_backend
    from sartor.errors import SartorError

    if backend != "auto":
        return [run(backend, isa, progress)], {}
    reports, unavailable = [], {}
    for name in backend_names():
        if name in WITHOUT_ARITHMETIC:
            continue
        try:
            with showing(progress, f"looking for devices of {name}"):
                there = bool(load_backend(name).devices())
        except SartorError as error:
            unavailable[name] = str(error)
            continue
        if there:
            reports.append(run(name, isa, progress))
        else:
            unavailable[name] = "no device on this machine"
    return reports, unavailable


def _speeds(backend: str, isa: str, progress: Progress) -> list[Speed]:
    """Of the CPU where no backend is named: it is the one that can tell."""
    from sartor.backends.registry import load_backend
    from sartor.backends.speed import measure_speed

    return measure_speed(load_backend("cpu" if backend == "auto" else backend), isa, progress)


# One line an operator, formats folded -------------------------------------------------

_CASE = ("OPERATOR", "FORMAT", "", "ERROR", "ALLOWED", "TIME", "PATH")


def _operators(reports: Sequence[Report]) -> list[str]:
    """In the order of the suite; last those that no backend here offers."""
    first: dict[str, None] = {}
    for report in reports:
        first.update(dict.fromkeys(result.operator for result in report.results))
    for report in reports:
        first.update(dict.fromkeys(missing.operator for missing in report.not_offered))
    return list(first)


def _summary(report: Report) -> list[list[str]]:
    """Of one backend: the error is the largest, as a share of what is allowed; time a median."""
    rows = [["OPERATOR", "FORMATS", "ERROR/ALLOWED", "TIME", "PATH"]]
    for operator in _operators([report]):
        results = [r for r in report.results if r.operator == operator]
        if not results:
            rows.append([operator, "-", "", "", "not offered"])
            continue
        largest = max(r.error / r.tolerance for r in results)
        paths = _folded([r.path for r in results])
        error = f"{largest:.0%}" if math.isfinite(largest) else "-"
        rows.append([operator, _right(results), error, _time(results), paths])
    return rows


def _matrix(reports: Sequence[Report]) -> list[list[str]]:
    """Operators by backends: how many formats are right, and the median time of a step."""
    rows = [["OPERATOR", *(report.backend.upper() for report in reports)]]
    for operator in _operators(reports):
        row = [operator]
        for report in reports:
            results = [r for r in report.results if r.operator == operator]
            row.append(f"{_right(results):<8}  {_time(results)}" if results else "-")
        rows.append(row)
    return rows


def _right(results: Sequence[Result]) -> str:
    right = sum(result.right for result in results)
    total = len(results)
    return f"{right} right" if right == total else f"{total - right} of {total} WRONG"


def _time(results: Sequence[Result]) -> str:
    return f"{statistics.median(result.microseconds for result in results):.0f} us"


def _folded(paths: Sequence[str]) -> str:
    """The paths of an operator's formats as one: two words where there are two, ``*`` for more."""
    words = [path.split() for path in dict.fromkeys(paths) if path]
    if len({len(path) for path in words}) > 1:
        return ", ".join(" ".join(path) for path in words)
    choices = [list(dict.fromkeys(at)) for at in zip(*words, strict=True)]
    return " ".join("|".join(at) if len(at) <= 2 else "*" for at in choices)


# Every case ---------------------------------------------------------------------------


def _every(reports: Sequence[Report]) -> list[list[str]]:
    rows = [["BACKEND", *_CASE]]
    for report in reports:
        rows += [[report.backend, *_case(result)] for result in report.results]
        rows += [
            [report.backend, missing.operator, missing.format, "-", "", "", "", missing.lacks]
            for missing in report.not_offered
        ]
    return rows


def _case(result: Result) -> list[str]:
    return [
        result.operator,
        result.format,
        "right" if result.right else "WRONG",
        f"{result.error:.1e}",
        f"{result.tolerance:.1e}",
        f"{result.microseconds:.0f} us",
        ": ".join(part for part in (result.path, result.message) if part),
    ]


def _speed_table(speeds: Sequence[Speed]) -> list[list[str]]:
    """A line a format; "slow" is far behind the others of a column."""
    from sartor.backends.speed import LENGTHS, SIZE, slow

    behind = slow(speeds)
    operators = list(dict.fromkeys(one.operator for one in speeds))
    head = [f"{SIZE} x {SIZE}, {sum(LENGTHS)} ROWS"]
    rows = [[*head, *(title for op in operators for title in (op.upper(), "OF PEAK"))]]
    for name in dict.fromkeys(one.format for one in speeds):
        row = [name]
        for operator in operators:
            found = [s for s in speeds if (s.operator, s.format) == (operator, name)]
            row += [f"{one.microseconds:.0f} us" for one in found] or ["-"]
            row += [f"{s.share:.1%}{' slow' if s in behind else ''}" for s in found] or ["-"]
        rows.append(row)
    return rows


def _line(report: Report) -> str:
    wrong = sum(not result.right for result in report.results)
    line = f"{report.backend} on {report.device}: {len(report.results)} cases, {wrong} wrong"
    lacks = Counter(missing.lacks for missing in report.not_offered)
    if not lacks:
        return line
    return f"{line}; not offered: " + ", ".join(f"{what} ({n})" for what, n in lacks.items())


def _json(
    reports: Sequence[Report], unavailable: dict[str, str], *, only_wrong: bool
) -> dict[str, Any]:
    return {
        "right": all(report.right for report in reports),
        "cases": sum(len(report.results) for report in reports),
        "backends": [
            {
                "backend": report.backend,
                "device": report.device,
                "right": report.right,
                "cases": len(report.results),
                "not_offered": [dataclasses.asdict(missing) for missing in report.not_offered],
            }
            for report in reports
        ],
        "results": [
            {"backend": report.backend, **dataclasses.asdict(result)}
            for report in reports
            for result in report.results
            if not (only_wrong and result.right)
        ],
        "unavailable": unavailable,
    }
