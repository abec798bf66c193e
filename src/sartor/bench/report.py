"""What a benchmark found."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sartor.bench.ceiling import PhaseCeiling
from sartor.bench.profile import OperatorTime
from sartor.hardware import Ceilings


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
    ceilings      of the device on these threads, measured in the same run; None where its backend
                  has no way to tell
    limits        of each rate, where there are ceilings: the most that it could be
    profile       by phase and operator, layers added up, the slowest first
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
    ceilings: Ceilings | None = None
    limits: Mapping[str, PhaseCeiling] = field(default_factory=dict)
    profile: Mapping[str, Mapping[str, OperatorTime]] = field(default_factory=dict)

    def share_of_ceiling(self, rate: str) -> float | None:
        """Of the median; None where the ceiling is not known."""
        limit = self.limits.get(rate)
        return None if limit is None else self.rates[rate].median / limit.tokens_per_s

    def to_json_dict(self) -> dict[str, object]:
        """Flat: ``<rate>_tps`` is the median, ``<rate>_tps_min`` and ``_max`` the extremes.

        Where there are ceilings, ``ceilings`` is an object, and every rate has ``_ceiling_tps``,
        ``_share_of_ceiling`` and ``_limit``. Where a profile was taken, ``profile_<rate>`` is an
        object of operators.
        """
        apart = ("rates", "host_share", "ceilings", "limits", "profile")
        out: dict[str, object] = {k: v for k, v in vars(self).items() if k not in apart}
        for name, spread in self.rates.items():
            out[f"{name}_tps"] = spread.median
            out[f"{name}_tps_min"] = spread.low
            out[f"{name}_tps_max"] = spread.high
        for name, limit in self.limits.items():
            out[f"{name}_ceiling_tps"] = limit.tokens_per_s
            out[f"{name}_share_of_ceiling"] = self.share_of_ceiling(name)
            out[f"{name}_limit"] = limit.limit
        out["decode_host_share"] = self.host_share
        out["ceilings"] = None if self.ceilings is None else self.ceilings.to_json_dict()
        for phase, operators in self.profile.items():
            out[f"profile_{phase}"] = {n: o.to_json_dict() for n, o in operators.items()}
        return out
