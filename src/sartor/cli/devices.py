"""``sartor devices``: what this machine has."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sartor.cli.options import Json
from sartor.cli.screen import Waiting, print_facts, print_json, print_table, size

if TYPE_CHECKING:
    from sartor.backends.base import Backend, Device


def devices(json: Json = False) -> None:
    """Show what this machine has, with measured ceilings."""
    from sartor.backends.registry import backend_names, load_backend
    from sartor.errors import SartorError
    from sartor.hardware import inventory

    machine = inventory()
    found: list[tuple[Device, dict[str, Any] | None]] = []
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
                    {**dataclasses.asdict(device), "ceilings": ceilings}
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
    rows = [["BACKEND", "DEVICE", "PATH", "READ", "INT8", "FP32", "WHAT"]]
    for device, ceilings in found:
        rows.append(
            [
                device.backend,
                device.name,
                device.isa or "-",
                *_measured(ceilings),
                device.description,
            ]
        )
    print_table(rows)
    for name, reason in missing.items():
        print(f"{name}: {reason}")


def _ceilings(backend: Backend, device: Device) -> dict[str, Any] | None:
    """What a device can reach, measured now; None for a backend that has no way to tell."""
    measure = getattr(backend, "ceilings", None)
    if measure is None:
        return None
    waiting = Waiting(f"measuring {device.name} ...")
    try:
        return dataclasses.asdict(measure(device.name))
    finally:
        waiting.over()


def _measured(ceilings: dict[str, Any] | None) -> list[str]:
    if ceilings is None:
        return ["-", "-", "-"]
    return [
        f"{ceilings['read_bytes_per_s'] / 1e9:.1f} GB/s",
        f"{ceilings['int8_ops_per_s'] / 1e12:.2f} TOPS",
        f"{ceilings['fp32_ops_per_s'] / 1e12:.2f} TFLOPS",
    ]
