"""The machine's inventory, read from the system."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Inventory:
    """Facts of the machine; bytes are bytes."""

    system: str
    machine: str
    cpu: str
    cores: int
    memory_bytes: int
    available_bytes: int


def available_cores() -> int:
    """Cores that this process may use: its affinity mask where the system has one."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def physical_cores(threads: int) -> int:
    """Cores that this many threads of ours have: two threads may share one core's arithmetic."""
    import psutil

    return min(threads, psutil.cpu_count(logical=False) or threads)


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        with info.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() == "model name":
                    return value.strip()
    return platform.processor() or platform.machine()


def memory() -> tuple[int, int]:
    """Bytes of memory: all, and those that can be had now."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        return sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        import psutil

        found = psutil.virtual_memory()
        return found.total, found.available


def inventory() -> Inventory:
    memory_bytes, available_bytes = memory()
    return Inventory(
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        cpu=cpu_name(),
        cores=available_cores(),
        memory_bytes=memory_bytes,
        available_bytes=available_bytes,
    )
