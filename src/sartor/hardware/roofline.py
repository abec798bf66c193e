"""The least time that a piece of work can take on a machine: the roofline.

Source: Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for
multicore architectures", CACM 52(4), 2009. Either the bytes that have to come from memory or the
operations take longer, and nothing can be faster than that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Arithmetic = Literal["int8", "bf16", "fp32"]
Limit = Literal["memory", "arithmetic"]


@dataclass(frozen=True)
class Peak:
    """The most that the best loop of one kind of arithmetic reached, on all threads at once.

    A multiply and an add count as two operations. ``clock_hz`` was measured in turns with the
    loop, by a chain of instructions that wait for each other. ``width`` is what a core of this
    processor can start in a cycle: one or two of the widest multiply-and-adds, or a tile product in
    16 cycles. 0 stands for not known.
    """

    ops_per_s: float
    clock_hz: float
    width: float
    cores: int

    @property
    def ops_per_cycle(self) -> float:
        """Of one core."""
        return self.ops_per_s / (self.clock_hz * self.cores) if self.clock_hz else 0.0

    @property
    def share_of_width(self) -> float | None:
        return self.ops_per_cycle / self.width if self.width and self.clock_hz else None

    def to_json_dict(self) -> dict[str, float | None]:
        return {
            "ops_per_s": self.ops_per_s,
            "clock_hz": self.clock_hz or None,
            "ops_per_cycle": self.ops_per_cycle or None,
            "share_of_width": self.share_of_width,
        }


@dataclass(frozen=True)
class Ceilings:
    """What a device can reach on ``threads`` threads, measured. ``bf16``: None where it has none.

    ``read_bytes_per_s`` is of streaming from memory: what fits in a cache may come faster.
    """

    read_bytes_per_s: float
    int8: Peak
    fp32: Peak
    bf16: Peak | None
    threads: int
    isa: str

    def peak(self, arithmetic: Arithmetic) -> Peak:
        """Of a kind of arithmetic; float32 stands in for a bfloat16 that there is not."""
        return {"int8": self.int8, "fp32": self.fp32, "bf16": self.bf16 or self.fp32}[arithmetic]

    def to_json_dict(self) -> dict[str, Any]:
        return {
            "read_bytes_per_s": self.read_bytes_per_s,
            "int8": self.int8.to_json_dict(),
            "fp32": self.fp32.to_json_dict(),
            "bf16": None if self.bf16 is None else self.bf16.to_json_dict(),
            "threads": self.threads,
            "isa": self.isa,
        }


@dataclass(frozen=True)
class Work:
    """``bytes`` that have to be moved, and operations by the arithmetic that they are done in."""

    bytes: float = 0.0
    operations: Mapping[Arithmetic, float] = field(default_factory=dict)

    def __add__(self, other: Work) -> Work:
        kinds = [*self.operations, *(k for k in other.operations if k not in self.operations)]
        return Work(
            self.bytes + other.bytes,
            {k: self.operations.get(k, 0.0) + other.operations.get(k, 0.0) for k in kinds},
        )

    def __truediv__(self, count: float) -> Work:
        return Work(self.bytes / count, {k: n / count for k, n in self.operations.items()})


@dataclass(frozen=True)
class Bound:
    """The least ``seconds`` that some work takes, and what it would wait for."""

    seconds: float
    limit: Limit


def bound(work: Work, ceilings: Ceilings) -> Bound:
    """The larger of the time for the bytes and the time for the operations."""
    memory = work.bytes / ceilings.read_bytes_per_s
    arithmetic = sum(n / ceilings.peak(kind).ops_per_s for kind, n in work.operations.items())
    return Bound(memory, "memory") if memory >= arithmetic else Bound(arithmetic, "arithmetic")
