"""The contract between programs and chips: what a backend is.

A backend knows operators, formats and devices; it never knows a model. To add one, start from
``examples/sartor-example-chip`` and register the class under the entry point group
``sartor.backends`` (docs/adding-a-chip.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import msgspec

from sartor.graph import Batch, Capabilities, LowRank, Program, ProgramWork, StepOutput
from sartor.hardware import Ceilings
from sartor.ops.weights import Weight
from sartor.plan import ExecutionPlan
from sartor.progress import SILENT, Progress


class WeightSource(Protocol):
    """Where the weights of a program come from, by the program's own names."""

    def weight(self, name: str) -> Weight:
        """The canonical form of one weight; FormatError names what is missing or misshapen."""

    def identity(self) -> str:
        """Cheap and stable: changes when the checkpoint changes; keys the packed file."""


@runtime_checkable
class Located(Protocol):
    """A source of weights that knows where on this machine they come from: a packed file then tells
    whose it is."""

    @property
    def path(self) -> Path: ...


class PackedWeights(Protocol):
    """Weights as the kernels stream them. Shared by every executable made from them."""

    @property
    def nbytes(self) -> int: ...

    @property
    def bits_per_weight(self) -> float:
        """Packed bits over parameters, scales and offsets counted."""


@dataclass(frozen=True)
class Device:
    """One place where programs run. ``memory_bytes`` is the total that it has."""

    name: str
    backend: str
    description: str
    memory_bytes: int
    isa: str = ""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that an executable holds: packed weights, sequence state, scratch.

    ``free`` are those that its device has left; None means that it uses the host's memory.
    """

    weights: int
    state: int
    scratch: int
    free: int | None = None


@runtime_checkable
class Executable(Protocol):
    """A program compiled for one device, with its weights and, once allocated, its state."""

    @property
    def program(self) -> Program: ...

    @property
    def plan(self) -> ExecutionPlan:
        """The plan with every "auto" replaced by what was chosen."""

    def block_bytes(self, group: int) -> int:
        """Bytes of one state block of a group, over all of its layers: of ``block_size`` tokens
        in a paged group, of one whole state in a recurrent one."""

    def allocate_state(self, blocks: Sequence[int]) -> None:
        """Reserves that many blocks for each state group; CapacityError when too much."""

    def load_adapter(self, index: int, layers: Mapping[str, LowRank]) -> None:
        """Makes an adapter known under the number by which batches name it.

        ``layers`` are by the name of the weight that they adapt; only weights of ``linear`` nodes
        can be (the caller checks names and shapes). A number in use is replaced.
        """

    def drop_adapter(self, index: int) -> None:
        """Frees an adapter. The caller sees to it that no later batch names it."""

    def submit(self, batch: Batch) -> int:
        """Starts a step and returns a handle; may finish inside, as the CPU does."""

    def collect(self, handle: int) -> StepOutput:
        """Waits for a step. Every handle is collected once, in the order of submission."""

    def memory(self) -> MemoryUse: ...

    def kernel_path(self, node: str) -> str:
        """Which code runs a node: arithmetic and weight format for linears, so that a test can
        prove that the fast path ran."""

    def close(self) -> None:
        """Frees state and scratch; weights live on as long as something else holds them."""


@runtime_checkable
class Backend(Protocol):
    """One kind of chip, or one library that drives chips."""

    name: str

    def devices(self) -> list[Device]:
        """Devices present on this machine; empty where the backend cannot run."""

    def capabilities(self, device: str) -> Capabilities: ...

    def pack(
        self, program: Program, source: WeightSource, plan: ExecutionPlan, cache: Path | None
    ) -> PackedWeights:
        """Brings the weights into the kernels' layout, strictly: shapes must match.

        ``cache`` is the folder of packed files; a matching one is mapped instead, and a new
        one is written beside the first answers. None keeps nothing on disk.
        """

    def compile(
        self,
        program: Program,
        weights: PackedWeights,
        plan: ExecutionPlan,
        device: str,
        taps: Sequence[str] = (),
    ) -> Executable:
        """Prepares a program to run; ``taps`` name nodes whose results batches may ask for."""


# What a backend may tell beside: ``sartor bench``, ``devices`` and ``conformance`` use it.


@runtime_checkable
class Profiled(Protocol):
    """An executable that counts what its steps ask of the machine, and times its nodes."""

    def work(self) -> ProgramWork: ...

    def profile(self, on: bool) -> None:
        """Starts timing from zero, or stops it and forgets the sums."""

    def seconds(self) -> list[tuple[str, float]]:
        """Seconds by node of :meth:`work`'s program since profiling began, in program order."""


@runtime_checkable
class Probed(Protocol):
    """A backend that measures what its devices can reach."""

    def ceilings(
        self, device: str, seconds: float = 0.5, *, threads: int = 0, isa: str = "auto"
    ) -> Ceilings:
        """Takes ``seconds`` for each loop; ``threads`` and ``isa`` as in a plan."""


class KernelTiming(msgspec.Struct, frozen=True):
    """What a linear layer took in one variant of its kernel, measured on this machine.

    ``activation``: int8, int16 (all inputs keep 16 bits) or fp32; ``format``, ``n`` and ``k``: of
    its matrices (``n`` of all of a group); ``experts``: matrices to choose from; ``rows``: that
    they multiply; ``variant``: what differs from the default, by the backend's own names.
    ``seconds``: quantising and multiplying, once. ``chosen``: the one in use for such rows.
    """

    operator: str
    activation: str
    format: str
    n: int
    k: int
    experts: int
    rows: int
    threads: int
    variant: dict[str, int]
    seconds: float
    chosen: bool = False

    @property
    def layer(self) -> tuple[object, ...]:
        """All but the variant and what came of it."""
        return (
            self.operator,
            self.activation,
            self.format,
            self.n,
            self.k,
            self.experts,
            self.rows,
            self.threads,
        )


@runtime_checkable
class Tunable(Protocol):
    """An executable that chooses among variants of its kernels by timing them. Variants give the
    same bits; ``sartor tune`` and idle servers call this, never the way to a first token."""

    def tuned_from(self, folder: Path, *, again: bool = False) -> None:
        """Uses what is stored there and keeps there what will be measured; takes a few
        milliseconds. ``again`` measures what is stored once more."""

    def tune(self, seconds: float, progress: Progress = SILENT) -> bool:
        """Measures between two steps, for about ``seconds``; True when nothing is left to do."""

    def use_tuned(self, on: bool) -> None:
        """Runs what was chosen, as it does anyway, or every kernel's default, to compare them."""

    def timings(self) -> list[KernelTiming]:
        """What is known of this executable's layers."""
