"""Why a worker process ended, as far as the system tells, and whom that may be blamed on."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Literal

Blame = Literal["outside", "memory", "itself"]
"""Who ended a process: somebody else, the kernel for want of memory, or the process itself."""

_FAULTS = frozenset(
    {"SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP", "SIGXCPU"}
)
"""Signals that a process gets for what it did; all others are sent by somebody else."""


@dataclass(frozen=True)
class Ending:
    """The end of one process: who is to blame, and what to tell. ``final``: the next process
    would end the same way."""

    blame: Blame
    cause: str
    final: bool = False


def oom_kills(vmstat: str = "/proc/vmstat") -> int | None:
    """Processes that this machine's kernel has killed for want of memory; None: it does not say.

    Linux counts them since 4.13, those that a container's own limit cost among them
    (``count_vm_event(OOM_KILL)`` in mm/oom_kill.c).
    """
    try:
        with open(vmstat, "rb") as file:
            for line in file:
                if line.startswith(b"oom_kill "):
                    return int(line.split()[1])
    except OSError:
        pass  # not Linux, or hidden
    return None


def explain(code: int, kills_before: int | None, kills_after: int | None) -> Ending:
    """What an exit status says. ``kills_*``: :func:`oom_kills` at the process's start and end.

    An operator's SIGKILL and the kernel's look alike, and only the second may be the doing of
    what ran; the kernel's count tells them apart.
    """
    if code >= 0 or os.name != "posix":
        return Ending("itself", f"the worker ended with exit status {code}")
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = str(-code)
    cause = f"the worker was killed by signal {name}"
    if name in _FAULTS:
        return Ending("itself", cause)
    if name != "SIGKILL":
        return Ending("outside", cause)
    if kills_before is None or kills_after is None:
        return Ending("outside", f"{cause}; the machine may be out of memory")
    if kills_after > kills_before:
        return Ending("memory", f"{cause}; the machine was out of memory")
    return Ending("outside", f"{cause} from outside")
