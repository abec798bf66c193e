"""``sartor bench``: the speed of a model on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from sartor.cli import options
from sartor.cli.arguments import Option
from sartor.cli.screen import PullProgress, Waiting, print_facts, print_json, print_table

if TYPE_CHECKING:
    from sartor.bench.report import BenchReport


def bench(
    model: options.Model,
    batch: Annotated[
        list[int] | None,
        Option(help="Sequences that decode at once (may be repeated). [default: 16]"),
    ] = None,
    repeats: Annotated[int, Option(help="Measurements of each; medians are shown.")] = 5,
    profile: Annotated[bool, Option(help="Show the time of each operator too.")] = False,
    threads: options.Threads = 0,
    context: options.Context = 0,
    backend: options.Backend = "auto",
    device: options.Device = "auto",
    kv: options.Kv = "bf16",
    activation: options.Activation = "int8",
    isa: options.Isa = "auto",
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
        isa=isa,
    )
    stored = ModelStore().ensure(model, PullProgress())
    waiting = Waiting(f"measuring {stored.name} ...")
    try:
        from sartor.bench.run import run_bench

        report = run_bench(
            stored.path,
            stored.name,
            plan,
            batches=batch or (16,),
            repeats=repeats,
            load_cache=sartor_home() / "packed",
            profile=profile,
        )
    finally:
        waiting.over()
    if json:
        print_json(report.to_json_dict())
    else:
        _print(report)


def _print(report: BenchReport) -> None:
    print_facts(
        [
            ("model", f"{report.model}, {report.bits_per_weight:.2f} bits a weight"),
            ("machine", report.machine),
            (
                "run on",
                f"{report.device} {report.isa}, {report.threads} threads, "
                f"{report.activation} x {report.kv} state",
            ),
            ("load", f"{report.load_seconds:.2f} s"),
            ("peak memory", f"{report.peak_rss_mb:.0f} MB"),
            ("host share", f"{report.host_share:.1%} of a decode step"),
        ]
    )
    print()
    rows = [["PHASE", "TOKENS/S", "LOWEST", "HIGHEST"]]
    for name, rate in report.rates.items():
        rows.append([name, f"{rate.median:.1f}", f"{rate.low:.1f}", f"{rate.high:.1f}"])
    print_table(rows)
    for phase, operators in report.profile.items():
        print()
        total = sum(operators.values()) or 1.0
        rows = [[f"OPERATOR ({phase})", "MS", "SHARE"]]
        for operator, seconds in sorted(operators.items(), key=lambda item: -item[1]):
            rows.append([operator, f"{seconds * 1e3:.2f}", f"{seconds / total:.1%}"])
        print_table(rows)
