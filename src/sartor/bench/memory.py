"""How much memory this process has used at most."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import psutil


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: a child of a large process starts with its parent's maximum there.
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        memory: Any = psutil.Process().memory_info()
        return int(memory.peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
