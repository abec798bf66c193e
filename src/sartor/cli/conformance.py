"""``sartor conformance``: the operator matrix of a backend."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sartor.cli import options
from sartor.cli.screen import print_json, print_table, say

if TYPE_CHECKING:
    from sartor.backends.conformance import Report, Result


def conformance(
    backend: options.Backend = "auto",
    isa: options.Isa = "auto",
    json: options.Json = False,
    wrong: Annotated[bool, typer.Option("--wrong", help="Show only what is wrong.")] = False,
) -> int:
    """Hold a backend's operators to the reference.

    Exit code 1 where anything is wrong.
    """
    from sartor.backends.conformance import run
    from sartor.backends.registry import choose

    name = choose(backend)[0].name
    report = run(name, isa)
    failures = sum(not result.right for result in report.results)
    shown = [r for r in report.results if not (wrong and r.right)]
    if json:
        print_json(_report(report, shown))
    else:
        if shown:
            print_table(
                [["OPERATOR", "FORMAT", "", "ERROR", "ALLOWED", "TIME", "PATH"], *map(_row, shown)]
            )
        say(f"{name} on {report.device}: {len(report.results)} cases, {failures} wrong")
    return 1 if failures else 0


def _row(result: Result) -> list[str]:
    return [
        result.operator,
        result.format,
        "right" if result.right else "WRONG",
        f"{result.error:.1e}",
        f"{result.tolerance:.1e}",
        f"{result.microseconds:.0f} us",
        f"{result.path} {result.message}".strip(),
    ]


def _report(report: Report, shown: list[Result]) -> dict[str, Any]:
    return {
        "backend": report.backend,
        "device": report.device,
        "right": report.right,
        "cases": len(report.results),
        "results": [dataclasses.asdict(result) for result in shown],
    }
