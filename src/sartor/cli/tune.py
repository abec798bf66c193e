"""``sartor tune``: the fastest kernels for a model on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sartor.cli import options
from sartor.cli.screen import print_facts, print_json, print_table
from sartor.progress.line import ProgressLine

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sartor.backends.base import KernelTiming
    from sartor.bench.gain import Gain

SECONDS = 10.0  # of measuring kernels
GAIN_SECONDS = 10.0  # of measuring what they bring


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
    """Measure which kernels are fastest for a model here, and what they bring.

    Takes 10 seconds at most for the kernels, then about 10 for the speed before and after. Answers
    stay the same, bit by bit. What is found is kept for every later run on this machine.
    """
    import msgspec

    from sartor.backends.base import Tunable
    from sartor.bench.gain import CONTEXT
    from sartor.errors import UsageError
    from sartor.store import ModelStore, sartor_home

    plan = options.make_plan(
        threads=threads,
        context=CONTEXT,
        backend=backend,
        device=device,
        kv="bf16",
        activation=activation,
        head_bits=head_bits,
        isa=isa,
        max_sequences=1,
        prefix_cache=False,
    )
    progress = ProgressLine()
    stored = ModelStore().ensure(model, progress)
    from sartor.bench.gain import measure_gain
    from sartor.engine.load import load

    cache = sartor_home() / "packed"
    loaded = load(stored.path, plan, stored.name, cache, progress=progress)
    executable = loaded.executable
    try:
        if not isinstance(executable, Tunable):
            raise UsageError(
                f"tune: backend {loaded.plan.backend} chooses its kernels itself; there is nothing "
                "to tune"
            )
        if again:
            executable.tuned_from(sartor_home() / "tuned", again=True)
        known = {timing.layer for timing in executable.timings()}
        executable.tune(SECONDS, progress)
        timings = executable.timings()
        gains = measure_gain(loaded, GAIN_SECONDS, progress)
    finally:
        executable.close()
    if json:
        plan = loaded.plan
        print_json(
            {
                "model": stored.name,
                "device": plan.device,
                "isa": plan.isa,
                "threads": plan.threads,
                "speed": {
                    name: {
                        "before_tps": gain.before.median,
                        "after_tps": gain.after.median,
                    }
                    for name, gain in gains.items()
                },
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
    if gains:
        print()
        print_table(_speed(gains))


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


def _speed(gains: Mapping[str, Gain]) -> list[list[str]]:
    """Medians of what was measured in turns."""
    rows = [["PHASE", "TOKENS/S BEFORE", "NOW", "GAIN"]]
    for name, gain in gains.items():
        row = [name, f"{gain.before.median:.1f}", f"{gain.after.median:.1f}"]
        rows.append([*row, f"{gain.share:+.1%}"])
    return rows
