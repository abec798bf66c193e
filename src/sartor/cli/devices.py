"""``sartor devices``: what this machine has."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from sartor.cli.extras import EXTRAS, missing_extras
from sartor.cli.options import Json
from sartor.cli.screen import print_facts, print_json, print_table, size, tera
from sartor.progress import Progress, showing
from sartor.progress.line import ProgressLine

if TYPE_CHECKING:
    from sartor.backends.base import Backend, Device
    from sartor.hardware import Ceilings

LOOP_SECONDS = 0.5  # of each of four loops that look for a ceiling


def devices(
    every: Annotated[
        bool, typer.Option("--all", help="Show the devices for tests too: reference and null.")
    ] = False,
    json: Json = False,
) -> None:
    """Show what this machine has, with measured ceilings, and what could be installed."""
    from sartor.backends.registry import FOR_TESTS, backend_names, load_backend
    from sartor.errors import SartorError
    from sartor.hardware import inventory

    machine = inventory()
    progress = ProgressLine()
    found: list[tuple[Device, Ceilings | None]] = []
    missing: dict[str, str] = {}
    for name in backend_names():
        if name in FOR_TESTS and not (every or json):
            continue
        try:
            with showing(progress, f"looking for devices of {name}"):
                backend = load_backend(name)
                there = backend.devices()
        except SartorError as error:
            missing[name] = str(error)
            continue
        found += [(device, _ceilings(backend, device, progress)) for device in there]
    if json:
        print_json(
            {
                "machine": dataclasses.asdict(machine),
                "devices": [
                    {
                        **dataclasses.asdict(device),
                        "for_tests": device.backend in FOR_TESTS,
                        "ceilings": None if ceilings is None else ceilings.to_json_dict(),
                    }
                    for device, ceilings in found
                ],
                "unavailable": missing,
                "extras": [
                    {
                        "name": extra.name,
                        "brings": extra.brings,
                        "installed": not extra.missing,
                        "missing": extra.missing,
                        "command": extra.command,
                    }
                    for extra in EXTRAS
                ],
            }
        )
        return
    print_facts(
        [
            ("system", f"{machine.system}, {machine.machine}"),
            ("processor", f"{machine.cpu}, {machine.cores} cores"),
            ("memory", f"{size(machine.memory_bytes)}, {size(machine.available_bytes)} free"),
        ]
    )
    print()
    rows = [["BACKEND", "DEVICE", "PATH", "WHAT"]]
    rows += [[d.backend, d.name, d.isa or "-", d.description] for d, _ in found]
    print_table(rows)
    for device, ceilings in found:
        if ceilings is not None:
            print(f"\n{device.name}, measured: {ceilings.isa}, {ceilings.threads} threads")
            print_facts(_measured(ceilings))
    if lines := _notes(missing):
        print()
        print("\n".join(lines))


def _notes(missing: dict[str, str]) -> list[str]:
    """What is not there, and how it could be."""
    lines = [
        f"{extra.name} is not installed ({extra.brings}): {extra.command}"
        for extra in missing_extras()
    ]
    if "torch" not in missing:
        from sartor.backends.torch.devices import missing_accelerator

        lines += [line for line in [missing_accelerator()] if line]
    elif any("torch" in extra.missing for extra in EXTRAS):
        del missing["torch"]  # said already
    return lines + [f"{name}: {reason}" for name, reason in missing.items()]


def _ceilings(backend: Backend, device: Device, progress: Progress) -> Ceilings | None:
    """What a device can reach, measured now; None for a backend that has no way to tell."""
    from sartor.backends.base import Probed

    if not isinstance(backend, Probed):
        return None
    with showing(progress, f"measuring {device.name}", seconds=4 * LOOP_SECONDS):
        return backend.ceilings(device.name, LOOP_SECONDS)


def _measured(ceilings: Ceilings) -> list[tuple[str, str]]:
    rows = [
        ("read", f"{ceilings.read_bytes_per_s / 1e9:.1f} GB/s"),
        ("int8", tera(ceilings.int8, "TOPS")),
        ("fp32", tera(ceilings.fp32, "TFLOPS")),
    ]
    return rows if ceilings.bf16 is None else [*rows, ("bf16", tera(ceilings.bf16, "TFLOPS"))]
