"""``sartor eval``: the quality of a model's answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sartor.cli import options
from sartor.cli.screen import arithmetic, print_facts, print_json
from sartor.progress.line import ProgressLine

if TYPE_CHECKING:
    from sartor.evaluation.evaluate import EvaluationReport


def evaluate(
    model: options.Model,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Compare with this model, run in fp32, or with `transformers` on the same one.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="A UTF-8 text instead of the bundled page.", show_default=False),
    ] = None,
    positions: Annotated[int, typer.Option(min=2, help="Tokens of the text to use.")] = 512,
    threads: options.Threads = 0,
    context: options.Context = 0,
    backend: options.Backend = "auto",
    device: options.Device = "auto",
    kv: options.Kv = "bf16",
    activation: options.Activation = "int8",
    head_bits: options.HeadBits = 0,
    isa: options.Isa = "auto",
    json: options.Json = False,
) -> None:
    """Measure perplexity, and distance to a reference."""
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
    )
    store, progress = ModelStore(), ProgressLine()
    stored = store.ensure(model, progress)
    other: Path | str | None = reference
    if reference not in (None, "transformers"):
        other = store.ensure(str(reference), progress).path
    from sartor.evaluation.evaluate import run_evaluation

    report = run_evaluation(
        stored.path,
        stored.name,
        plan,
        reference=other,
        text=text,
        positions=positions,
        cache=sartor_home() / "packed",
        progress=progress,
    )
    if json:
        print_json(report.to_json_dict())
    else:
        print_facts(_facts(report))


def _facts(report: EvaluationReport) -> list[tuple[str, str]]:
    facts = [
        ("model", f"{report.model}, {report.bits_per_weight:.2f} bits a weight"),
        (
            "run on",
            f"{report.device} {report.isa}, "
            f"{arithmetic(report.activation, report.kv, report.head_bits)}",
        ),
        ("text", f"{report.text}, {report.positions} tokens in {report.seconds:.1f} s"),
        ("perplexity", f"{report.perplexity:.3f}"),
    ]
    if report.reference is not None:
        facts += [
            ("reference", f"{report.reference}, perplexity {report.reference_perplexity:.3f}"),
            ("mean KL", f"{report.mean_kl:.3g} nats"),
            ("max KL", f"{report.max_kl:.3g} nats"),
            ("top-1", f"{report.top_1_agreement:.2%} agree"),
        ]
    return facts
