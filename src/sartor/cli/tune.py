"""``sartor tune``: the fastest kernels for a model on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sartor.cli import options
from sartor.cli.screen import PullProgress, Waiting, print_facts, print_json, print_table

if TYPE_CHECKING:
    from sartor.backends.base import KernelTiming

SECONDS = 10.0


def tune(
    model: options.Model,
    again: Annotated[
        bool, typer.Option("--again", help="Measure also what is already known.")
    ] = False,
    threads: options.Threads = 0,
    backend: options.Backend = "auto",
    device: options.Device = "auto",
    activation: options.Activation = "int8",
    head_bits: options.HeadBits = 0,
    isa: options.Isa = "auto",
    json: options.Json = False,
) -> None:
    """Measure which kernels are fastest for a model here, in 10 seconds at most.

    Answers stay the same, bit by bit. What is found is kept for every later run on this machine.
    """
    import msgspec

    from sartor.backends.base import Tunable
    from sartor.errors import UsageError
    from sartor.store import ModelStore, sartor_home

    plan = options.make_plan(
        threads=threads,
        context=0,
        backend=backend,
        device=device,
        kv="bf16",
        activation=activation,
        head_bits=head_bits,
        isa=isa,
    )
    stored = ModelStore().ensure(model, PullProgress())
    waiting = Waiting(f"tuning {stored.name} ...")
    try:
        from sartor.engine.load import load

        loaded = load(stored.path, plan, stored.name, sartor_home() / "packed")
        executable = loaded.executable
        if not isinstance(executable, Tunable):
            raise UsageError(
                f"tune: backend {loaded.plan.backend} chooses its kernels itself; there is nothing "
                "to tune"
            )
        if again:
            executable.tuned_from(sartor_home() / "tuned", again=True)
        known = {timing.layer for timing in executable.timings()}
        executable.tune(SECONDS)
        timings = executable.timings()
    finally:
        waiting.over()
    if json:
        plan = loaded.plan
        print_json(
            {
                "model": stored.name,
                "device": plan.device,
                "isa": plan.isa,
                "threads": plan.threads,
                "timings": [msgspec.structs.asdict(timing) for timing in timings],
            }
        )
        return
    layers = _by_layer(timings)
    changed = [found for found in layers if found[1].variant]
    measured = sum(default.layer not in known for default, _ in layers)
    print_facts(
        [
            ("model", stored.name),
            ("run on", f"{loaded.plan.device} {loaded.plan.isa}, {loaded.plan.threads} threads"),
            ("measured", f"{measured} layers by rows now, {len(layers) - measured} before"),
            ("changed", f"{len(changed)}; the others are fastest as they are"),
        ]
    )
    if changed:
        print()
        print_table(_rows(changed))


def _by_layer(timings: list[KernelTiming]) -> list[tuple[KernelTiming, KernelTiming]]:
    """The default and the chosen variant of each layer and number of rows."""
    defaults = {timing.layer: timing for timing in timings if not timing.variant}
    return [(defaults[timing.layer], timing) for timing in timings if timing.chosen]


def _rows(changed: list[tuple[KernelTiming, KernelTiming]]) -> list[list[str]]:
    rows = [["LAYER", "FORMAT", "N x K", "ROWS", "US BEFORE", "US NOW", "SAVED", "VARIANT"]]
    for default, chosen in changed:
        saved = 1 - chosen.seconds / default.seconds
        variant = " ".join(f"{name}={value}" for name, value in chosen.variant.items())
        row = [chosen.operator, f"{chosen.activation} {chosen.format}"]
        row += [f"{chosen.n} x {chosen.k}", str(chosen.rows)]
        row += [f"{default.seconds * 1e6:.0f}", f"{chosen.seconds * 1e6:.0f}", f"{saved:.0%}"]
        rows.append([*row, variant])
    return rows
