"""What lies in the store's folder and is of no more use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LeftoverKind = Literal["download", "model", "copy", "lock", "packed", "tuned"]


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file or folder that can go. ``nbytes`` is what that frees; ``why`` is for people.

    In the place of a ``copy`` comes a link to the file that it equals.
    """

    kind: LeftoverKind
    path: Path
    nbytes: int
    why: str
