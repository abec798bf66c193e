"""A backend that some prompts are poison to: null, but for words that make a step go wrong.

:func:`installed` is the folder of a package that declares it; whoever has the folder on the path
finds the backend as any user finds that of another package.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sartor.backends.base import PackedWeights
from sartor.backends.null.backend import NullBackend, NullExecutable
from sartor.graph import Batch, Program
from sartor.plan import ExecutionPlan


def _raise() -> None:
    raise ArithmeticError("this prompt cannot be computed")


HARMS: dict[str, Callable[[], object]] = {
    "RAISE!": _raise,
    "ABORT!": os.abort,
    "FAULT!": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "STUCK!": lambda: time.sleep(3600),
    "FROZEN!": lambda: ctypes.PyDLL(None).sleep(3600),  # with the interpreter's lock
}


class PoisonBackend(NullBackend):
    """The null backend under another name, with a taster before it."""

    name = "poison"

    def compile(
        self,
        program: Program,
        weights: PackedWeights,
        plan: ExecutionPlan,
        device: str,
        taps: Sequence[str] = (),
    ) -> NullExecutable:
        executable = super().compile(program, weights, plan, device, taps)
        submit = executable.submit

        def taste(batch: Batch) -> int:
            # Tokens of the tiny model are bytes, but for a few.
            text = bytes(t if 0 <= t < 256 else 0 for t in batch.tokens.tolist())
            for word, harm in HARMS.items():
                if word.encode() in text:
                    harm()
            return submit(batch)

        executable.submit = taste  # type: ignore[method-assign]
        return executable


def installed(folder: Path) -> dict[str, str]:
    """Declares the backend in ``folder``; the environment in which a process finds it."""
    metadata = folder / "poison-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: poison\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[sartor.backends]\npoison = poison_backend:PoisonBackend\n"
    )
    path = [str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, path))}
