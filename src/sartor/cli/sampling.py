"""How tokens are drawn where a request says nothing, as commands show it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sartor.formats import Checkpoint
    from sartor.graph import SamplingDefaults


def sampling_values(*layers: SamplingDefaults) -> dict[str, Any]:
    """For JSON: each value in effect and where it is from; the first of the layers comes first."""
    from sartor.graph import sampling_in_effect

    return {
        name: {"value": value, "from": origin}
        for name, (value, origin) in sampling_in_effect(*layers).items()
    }


def sampling_of(path: Path) -> SamplingDefaults | None:
    """The checkpoint's own values; None where it makes vectors, or cannot be read."""
    from sartor.errors import SartorError
    from sartor.formats import open_checkpoint
    from sartor.models import own_sampling

    try:
        checkpoint = open_checkpoint(path)
    except SartorError:  # what is wrong with it is for the commands that need all of it
        return None
    try:
        return own_sampling(checkpoint) if _writes_text(checkpoint) else None
    finally:
        checkpoint.close()


def _writes_text(checkpoint: Checkpoint) -> bool:
    from sartor.errors import SartorError
    from sartor.models import load_model

    try:
        return load_model(checkpoint).program.samples
    except SartorError:
        return True
