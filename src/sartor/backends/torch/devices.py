"""The devices that torch can drive on this machine, by the names that plans use."""

from __future__ import annotations

import sys

import psutil
import torch

from sartor.backends.base import Device
from sartor.errors import UsageError
from sartor.hardware import available_cores, cpu_name

CPU = "torch-cpu"
"""Torch's own CPU device; plain "cpu" is the native backend's."""


def list_devices(backend: str) -> list[Device]:
    """Accelerators first, torch's CPU last. ``isa`` is the compute capability on CUDA."""
    found = []
    memory = psutil.virtual_memory().total
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            isa = f"sm_{facts.major}{facts.minor}"
            found.append(Device(f"cuda:{index}", backend, facts.name, facts.total_memory, isa))
    if torch.xpu.is_available():
        for index in range(torch.xpu.device_count()):
            xpu = torch.xpu.get_device_properties(index)
            found.append(Device(f"xpu:{index}", backend, xpu.name, xpu.total_memory))
    if torch.backends.mps.is_available():
        found.append(Device("mps", backend, "Apple GPU", memory))
    cpu = f"{cpu_name()}, {available_cores()} cores, by torch"
    return [*found, Device(CPU, backend, cpu, memory)]


def missing_accelerator() -> str:
    """One line for people where torch drives nothing but the processor; empty elsewhere."""
    if [device.name for device in list_devices("torch")] != [CPU]:
        return ""
    version = f"torch {torch.__version__}"
    if torch.version.cuda is None and torch.version.hip is None and sys.platform != "darwin":
        return (
            f"{version} is a build for processors alone; for a GPU install another build of it "
            "(https://pytorch.org/get-started)"
        )
    return f"{version} finds no CUDA device and no other accelerator here"


def torch_device(name: str, known: list[Device]) -> torch.device:
    """The torch device of a name; "auto" is the first known, others must be among them."""
    names = [device.name for device in known]
    if name == "auto":
        name = names[0]
    if name not in names:
        raise UsageError(f"torch backend: no device {name!r} here; choose from {', '.join(names)}")
    return torch.device("cpu" if name == CPU else name)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device now, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "xpu":
        return torch.xpu.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
