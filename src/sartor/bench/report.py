"""What a benchmark found."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Spread:
    """Median and extremes of repeated measurements."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        return Spread(statistics.median(samples), min(samples), max(samples))


@dataclass(frozen=True)
class BenchReport:
    """Speed of one model under one plan.

    rates         tokens a second by name: ``prompt_512``, ``decode``, ``batch_16``, ...
    host_share    share of a decode step, 0 to 1, that is not the backend's work
    load_seconds  from the path to an engine that takes requests
    peak_rss_mb   of this process, in 10^6 bytes
    profile       per phase ("prompt", "decode"): seconds by operator, layers added up
    """

    model: str
    version: str
    machine: str
    backend: str
    device: str
    isa: str
    threads: int
    activation: str
    head_bits: int
    kv: str
    block_size: int
    max_batch_tokens: int
    repeats: int
    rates: Mapping[str, Spread]
    host_share: float
    load_seconds: float
    peak_rss_mb: float
    bits_per_weight: float
    profile: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_json_dict(self) -> dict[str, object]:
        """Flat: ``<rate>_tps`` is the median, ``<rate>_tps_min`` and ``_max`` the extremes.

        Where a profile was taken, ``profile_prompt`` and ``profile_decode`` are objects.
        """
        out: dict[str, object] = {
            name: value
            for name, value in vars(self).items()
            if name not in ("rates", "host_share", "profile")
        }
        for name, spread in self.rates.items():
            out[f"{name}_tps"] = spread.median
            out[f"{name}_tps_min"] = spread.low
            out[f"{name}_tps_max"] = spread.high
        out["decode_host_share"] = self.host_share
        for phase, seconds in self.profile.items():
            out[f"profile_{phase}"] = dict(seconds)
        return out
