"""Weights on a torch device: as compact as they come, widened to float32 where they are used.

Dense weights keep their type. Quantised ones keep their canonical codes, two to a byte where
four bits are enough, beside scales and offsets in fp16 where that is exact and in fp32 where it
is not. A table of what each byte means turns codes into floats, the same way for every family.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sartor.backends.base import WeightSource
from sartor.backends.loading import iterate_weights
from sartor.graph import Program
from sartor.ops.functions import rounds_activations
from sartor.ops.weights import (
    E4M3,
    F32,
    AffineFormat,
    DenseFormat,
    Fp8Format,
    LookupFormat,
    Weight,
    WeightFormat,
)

Rows = Tensor | slice | None


@dataclass(frozen=True)
class TorchWeight:
    """One weight on a device; ``shape`` is that of the canonical form.

    data         floats; or one code a byte ``[..., N, K]``; or two codes a byte, the even column
                 in the lower half ``[..., N, K / 2]``
    scale        ``[..., N, K / group]``, as ``offset``
    table        what a byte means: float32 ``[256]``; of two codes, the bits of both floats as
                 one int64 ``[256]``
    permutation  column k holds input ``permutation[k]``; ``inverse`` undoes it
    rounds       whether the plan's int8 activations apply
    """

    name: str
    format: WeightFormat
    shape: tuple[int, ...]
    data: Tensor
    scale: Tensor | None = None
    offset: Tensor | None = None
    table: Tensor | None = None
    permutation: Tensor | None = None
    inverse: Tensor | None = None
    rounds: bool = False

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What belongs to this weight alone; tables are shared by all of a format."""
        every = (self.data, self.scale, self.offset, self.permutation, self.inverse)
        return tuple(part for part in every if part is not None)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def floats(self, rows: Rows = None) -> Tensor:
        """float32 values, columns in stored order; ``rows`` picks from the first axis."""
        data, scale, offset = (_pick(part, rows) for part in (self.data, self.scale, self.offset))
        assert data is not None
        if self.table is None:
            return data.float()
        assert scale is not None
        values = self.table.index_select(0, data.reshape(-1).int()).view(torch.float32)
        grouped = values.view(*scale.shape, -1).mul_(scale.unsqueeze(-1))
        if offset is not None:
            grouped = grouped.add_(offset.unsqueeze(-1))
        return grouped.view(*data.shape[:-1], self.shape[-1])

    def pieces(self, elements: int) -> Iterator[tuple[slice, Tensor]]:
        """:meth:`floats` a few rows of the first axis at a time, about ``elements`` values each."""
        count = self.shape[0]
        step = max(1, elements * count // max(1, int(np.prod(self.shape))))
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            yield rows, self.floats(rows)


def _pick(part: Tensor | None, rows: Rows) -> Tensor | None:
    if part is None or rows is None:
        return part
    return part[rows] if isinstance(rows, slice) else part.index_select(0, rows)


class TorchWeights:
    """Every weight of a program on one device."""

    def __init__(self, by_name: dict[str, TorchWeight], device: torch.device) -> None:
        self.by_name = by_name
        self.device = device

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.by_name.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / sum(int(np.prod(w.shape)) for w in self.by_name.values())


def pack(program: Program, source: WeightSource, device: torch.device) -> TorchWeights:
    """Copies a program's weights to a device, one after the other; FormatError names a misfit."""
    loaded = {name: to_device(weight, device) for name, weight in iterate_weights(program, source)}
    return TorchWeights(loaded, device)


def to_device(weight: Weight, device: torch.device) -> TorchWeight:
    """One canonical weight in the backend's form."""
    if isinstance(weight.format, DenseFormat):
        data = _dense(weight, device)
    elif _halves(weight.format):
        codes = np.asarray(weight.data, np.uint8)
        data = _upload(codes[..., ::2] | (codes[..., 1::2] << 4), device)
    else:
        data = _upload(weight.data, device)
    permutation = None if weight.permutation is None else weight.permutation.astype(np.int64)
    return TorchWeight(
        weight.name,
        weight.format,
        weight.shape,
        data,
        scale=_compact(weight.scale, device),
        offset=_compact(weight.offset, device),
        table=_table(weight.format, device),
        permutation=None if permutation is None else _upload(permutation, device),
        inverse=None if permutation is None else _upload(np.argsort(permutation), device),
        rounds=rounds_activations(weight),
    )


def _dense(weight: Weight, device: torch.device) -> Tensor:
    assert isinstance(weight.format, DenseFormat)
    if weight.format.dtype == "bf16":
        data = _upload(weight.data.view(np.int16), device).view(torch.bfloat16)
    else:
        data = _upload(weight.data, device)
    # Vectors are read whole by small operators: widening them each time costs more than it saves.
    return data.float() if data.ndim == 1 else data


def _halves(form: WeightFormat) -> bool:
    """Whether two codes share a byte."""
    return isinstance(form, LookupFormat) or (isinstance(form, AffineFormat) and form.bits <= 4)


@cache
def _table(form: WeightFormat, device: torch.device) -> Tensor | None:
    """What a byte of codes means before scale and offset; see :class:`TorchWeight`."""
    codes = np.arange(256)
    match form:
        case AffineFormat(zero=zero):
            values = (codes - zero).astype(np.float32)
        case LookupFormat(table=table):
            values = np.asarray(table, np.float32)[codes & 15]
        case Fp8Format():
            values = E4M3
        case DenseFormat():
            return None
    if not _halves(form):
        return _upload(values, device)
    pairs = np.stack([values[codes & 15], values[codes >> 4]], axis=1)
    return _upload(pairs.view(np.int64)[:, 0], device)


def _compact(values: F32 | None, device: torch.device) -> Tensor | None:
    """fp16 where it loses nothing."""
    if values is None:
        return None
    with np.errstate(over="ignore"):
        small = values.astype(np.float16)
    exact = np.array_equal(small.astype(np.float32), values)
    return _upload(small if exact else values, device)


def _upload(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy on the device; checkpoints are mapped read-only, and torch wants its own memory."""
    return torch.from_numpy(np.array(array, order="C")).to(device)
