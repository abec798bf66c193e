"""Where the example lies, and the environment in which it is built and used."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import sartor

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "sartor-example-chip"
Python = Callable[..., subprocess.CompletedProcess[str]]


def environment(*folders: Path) -> dict[str, str]:
    """With Sartor as the tests see it, installed or not, and no way to an index."""
    house = Path(sartor.__file__).parents[1]
    return {
        **{name: value for name, value in os.environ.items() if name != "SARTOR_EXAMPLE_KERNELS"},
        "PYTHONPATH": os.pathsep.join(map(str, (*folders, house))),
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
