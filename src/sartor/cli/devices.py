"""``sartor devices``: what this machine has."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sartor.cli.options import Json
from sartor.cli.screen import Waiting, print_facts, print_json, print_table, size, tera

if TYPE_CHECKING:
    from sartor.backends.base import Backend, Device
    from sartor.hardware import Ceilings


def devices(json: Json = False) -> None:
    """Show what this machine has, with measured ceilings."""
    from sartor.backends.registry import backend_names, load_backend
    from sartor.errors import SartorError
    from sartor.hardware import inventory

    machine = inventory()
    found: list[tuple[Device, Ceilings | None]] = []
    missing: dict[str, str] = {}
    for name in backend_names():
        try:
            backend = load_backend(name)
        except SartorError as error:
            missing[name] = str(error)
            continue
        found += [(device, _ceilings(backend, device)) for device in backend.devices()]
    if json:
        print_json(
            {
                "machine": dataclasses.asdict(machine),
                "devices": [
                    {
                        **dataclasses.asdict(device),
                        "ceilings": None if ceilings is None else ceilings.to_json_dict(),
                    }
                    for device, ceilings in found
                ],
                "unavailable": missing,
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
    for name, reason in missing.items():
        print(f"{name}: {reason}")


def _ceilings(backend: Backend, device: Device) -> Ceilings | None:
    """What a device can reach, measured now; None for a backend that has no way to tell."""
    from sartor.backends.base import Probed

    if not isinstance(backend, Probed):
        return None
    waiting = Waiting(f"measuring {device.name} ...")
    try:
        return backend.ceilings(device.name)
    finally:
        waiting.over()


def _measured(ceilings: Ceilings) -> list[tuple[str, str]]:
    rows = [
        ("read", f"{ceilings.read_bytes_per_s / 1e9:.1f} GB/s"),
        ("int8", tera(ceilings.int8, "TOPS")),
        ("fp32", tera(ceilings.fp32, "TFLOPS")),
    ]
    return rows if ceilings.bf16 is None else [*rows, ("bf16", tera(ceilings.bf16, "TFLOPS"))]
