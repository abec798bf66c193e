"""``sartor bench``: the speed of a model on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sartor.cli import options
from sartor.cli.screen import (
    arithmetic,
    print_facts,
    print_json,
    print_table,
    tera,
)
from sartor.progress.line import ProgressLine

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sartor.bench.profile import OperatorTime
    from sartor.bench.report import BenchReport
    from sartor.hardware import Ceilings


def bench(
    model: options.Model,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Sequences that decode at once (may be repeated).  [default: 16]"),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Measurements of each; medians are shown.")] = 5,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show time and roofline of each operator too.")
    ] = False,
    threads: options.Threads = 0,
    context: options.Context = 0,
    backend: options.Backend = "auto",
    device: options.Device = "auto",
    kv: options.Kv = "bf16",
    activation: options.Activation = "int8",
    head_bits: options.HeadBits = 0,
    isa: options.Isa = "auto",
    tune: options.Tune = True,
    json: options.Json = False,
) -> None:
    """Measure how fast a model reads and writes."""
    from sartor.store import ModelStore, sartor_home

    plan = options.make_plan(
        threads=threads,
        context=context,
        backend=backend,
        device=device,
        kv=kv,
        activation=activation,
        head_bits=head_bits,
        isa=isa,
        tune=tune,
    )
    progress = ProgressLine()
    stored = ModelStore().ensure(model, progress)
    from sartor.bench.run import run_bench

    report = run_bench(
        stored.path,
        stored.name,
        plan,
        batches=batch or (16,),
        repeats=repeats,
        load_cache=sartor_home() / "packed",
        profile=profile,
        progress=progress,
    )
    if json:
        print_json(report.to_json_dict())
    else:
        _print(report)


def _print(report: BenchReport) -> None:
    found = report.ceilings
    facts = [
        ("model", f"{report.model}, {report.bits_per_weight:.2f} bits a weight"),
        ("machine", report.machine),
        (
            "run on",
            f"{report.device} {report.isa}, {report.threads} threads, "
            f"{arithmetic(report.activation, report.kv, report.head_bits)}",
        ),
        ("load", f"{report.load_seconds:.2f} s"),
        ("peak memory", f"{report.peak_rss_mb:.0f} MB"),
        ("host share", f"{report.host_share:.1%} of a decode step"),
    ]
    if found is not None:
        facts.append(("memory", f"{found.read_bytes_per_s / 1e9:.1f} GB/s, measured"))
        facts.append(("arithmetic", f"{tera(found.int8, 'int8 TOPS')}, measured"))
    print_facts(facts)
    print()
    rows = [["PHASE", "TOKENS/S", "LOWEST", "HIGHEST", "OF CEILING", "LIMIT"]]
    for name, rate in report.rates.items():
        share, limit = report.share_of_ceiling(name), report.limits.get(name)
        row = [name, f"{rate.median:.1f}", f"{rate.low:.1f}", f"{rate.high:.1f}"]
        rows.append([*row, _percent(share), limit.limit if limit else "-"])
    print_table(rows)
    for phase, operators in report.profile.items():
        print()
        print_table(_operators(phase, operators, found))


SMALL = 0.005
"""Operators that take less of a phase than this share one line."""


def _operators(
    phase: str, operators: Mapping[str, OperatorTime], ceilings: Ceilings | None
) -> list[list[str]]:
    """Of one step: what each operator took, moved and multiplied, and the least it could take."""
    from sartor.bench.profile import OperatorTime

    whole = OperatorTime.total(operators.values(), ceilings)
    large = {n: o for n, o in operators.items() if o.seconds >= SMALL * whole.seconds}
    small = [o for n, o in operators.items() if n not in large]
    shown = list(large.items())
    if small:
        shown.append((f"{len(small)} others", OperatorTime.total(small, ceilings)))
    rows = [[f"OPERATOR ({phase})", "MS", "SHARE", "MB", "GOP", "LEAST MS", "REACHED", "LIMIT"]]
    for name, found in [*shown, ("all", whole)]:
        row = [name, f"{found.seconds * 1e3:.2f}", f"{found.seconds / whole.seconds:.1%}"]
        least = found.bound
        if least is None:
            rows.append([*row, "-", "-", "-", "-", "-"])
            continue
        row += [
            f"{found.work.bytes / 1e6:.2f}",
            f"{sum(found.work.operations.values()) / 1e9:.3f}",
            f"{least.seconds * 1e3:.2f}",
        ]
        rows.append([*row, _percent(found.reached), least.limit])
    return rows


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
