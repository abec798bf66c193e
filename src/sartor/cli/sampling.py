"""How tokens are drawn where a request says nothing, as commands show it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sartor.graph import SamplingDefaults


def sampling_values(*layers: SamplingDefaults) -> dict[str, Any]:
    """For JSON: each value in effect and where it is from; the first of the layers comes first."""
    from sartor.graph import sampling_in_effect

    return {
        name: {"value": value, "from": origin}
        for name, (value, origin) in sampling_in_effect(*layers).items()
    }
