"""The place where tuned kernels plug in.

Each operator has one plain implementation (:data:`~sartor.backends.torch.operators.PLAIN`). A
kernel registered here replaces it for an operator, and where it says so only for one weight
format, one family of formats or one kind of device::

    @register("linear", name="triton", format="affine", device="cuda")
    def triton_linear(step: Step, node: Node) -> Tensor: ...

Executables look kernels up once, when they are compiled; ``kernel_path`` names what they found.
A kernel that runs on CUDA must neither wait for the device nor ask the host for a shape that
depends on values: steps of single tokens are captured into graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from sartor.errors import UsageError
from sartor.graph import Node
from sartor.ops import OPERATORS
from sartor.ops.weights import AffineFormat, DenseFormat, LookupFormat, WeightFormat

if TYPE_CHECKING:
    from sartor.backends.torch.step import Step

Results = Tensor | tuple[Tensor, ...]
Handler = Callable[["Step", Node], Results]
"""Computes a node from a step's values: one tensor, or one for each of the node's results."""

ANY = ""


@dataclass(frozen=True)
class Kernel:
    """An implementation of an operator, and the name that ``kernel_path`` shows."""

    name: str
    run: Handler


_kernels: dict[tuple[str, str, str], Kernel] = {}


def family(form: WeightFormat) -> str:
    """ "dense", "affine", "lookup" or "fp8"."""
    if isinstance(form, DenseFormat):
        return "dense"
    if isinstance(form, AffineFormat):
        return "affine"
    return "lookup" if isinstance(form, LookupFormat) else "fp8"


def register(
    op: str, *, name: str, format: str = ANY, device: str = ANY
) -> Callable[[Handler], Handler]:
    """Decorates the implementation of ``op`` for weights of ``format`` (the name of a format or
    of a family) on devices of the torch type ``device``; the most specific one is used."""
    if op not in OPERATORS:
        raise UsageError(f"kernel {name}: operator {op!r} is unknown")
    key = (op, format, device)
    if key in _kernels:
        raise UsageError(f"kernel {name}: {_kernels[key].name} is registered for {key} already")

    def add(run: Handler) -> Handler:
        _kernels[key] = Kernel(name, run)
        return run

    return add


def unregister(op: str, *, format: str = ANY, device: str = ANY) -> None:
    """Takes a kernel back; executables compiled with it keep it."""
    del _kernels[op, format, device]


def find(op: str, form: WeightFormat | None, device: str) -> Kernel | None:
    """The kernel registered for an operator over a weight, or None for the plain one."""
    formats = (ANY,) if form is None else (form.name, family(form), ANY)
    for wanted in formats:
        for place in (device, ANY):
            if (op, wanted, place) in _kernels:
                return _kernels[op, wanted, place]
    return None
