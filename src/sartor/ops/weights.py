"""Weight formats: how the numbers of a weight matrix are stored.

Two quantised families cover the integer formats that Sartor reads, next to plain floats and to
eight-bit floats with scales:

*affine*   ``w[n, k] = scale[n, k // group] * (code[n, k] - zero) + offset[n, k // group]``
*lookup*   ``w[n, k] = scale[n, k // group] * table[code[n, k]]``
*fp8*      ``w[n, k] = scale[n, k // group] * e4m3(code[n, k])``

A :class:`Weight` is the canonical, exact form in memory: codes are one unsigned byte each,
scales and offsets are float32. Backends pack it into whatever their kernels stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sartor.errors import FormatError

FloatName = Literal["fp32", "fp16", "bf16"]
F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

FLOAT_BITS: Mapping[str, int] = {"fp32": 32, "fp16": 16, "bf16": 16}


@dataclass(frozen=True)
class DenseFormat:
    """Plain floating point numbers."""

    dtype: FloatName

    @property
    def name(self) -> str:
        return self.dtype

    @property
    def bits_per_weight(self) -> float:
        return float(FLOAT_BITS[self.dtype])


@dataclass(frozen=True)
class AffineFormat:
    """Unsigned codes of ``bits`` bits in groups of ``group`` along the input dimension.

    ``zero`` is the constant zero point (8 for Q4_0, 128 for int8). ``offset`` says whether a
    float offset a group is stored beside the scale (Q4_1, Q4_K, and integer zero points that
    vary by group, which become ``-scale * zero_point``).
    """

    bits: int
    group: int
    zero: int = 0
    offset: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise FormatError(f"affine format: {self.bits} bits a code; 2 to 8 are supported")
        if self.group < 16 or self.group % 16:
            raise FormatError(
                f"affine format: groups of {self.group}; a multiple of 16 is supported"
            )
        if not 0 <= self.zero < 2**self.bits:
            raise FormatError(f"affine format: zero point {self.zero} outside {self.bits} bits")

    @property
    def name(self) -> str:
        return f"affine{self.bits}g{self.group}{'o' if self.offset else ''}"

    @property
    def bits_per_weight(self) -> float:
        """Bits with fp16 scales and offsets, as packed."""
        return self.bits + (32 if self.offset else 16) / self.group


@dataclass(frozen=True)
class LookupFormat:
    """4-bit codes into a table of 16 small signed integers, scaled by group."""

    table: tuple[int, ...]
    group: int

    def __post_init__(self) -> None:
        if len(self.table) != 16 or not all(-128 <= v <= 127 for v in self.table):
            raise FormatError("lookup format: the table needs 16 entries that fit in int8")
        if self.group < 16 or self.group % 16:
            raise FormatError(
                f"lookup format: groups of {self.group}; a multiple of 16 is supported"
            )

    @property
    def name(self) -> str:
        return f"lookup4g{self.group}"

    @property
    def bits_per_weight(self) -> float:
        return 4 + 16 / self.group


@dataclass(frozen=True)
class Fp8Format:
    """Floats of 8 bits (E4M3 without infinities, arXiv:2209.05433), scaled by group."""

    group: int

    def __post_init__(self) -> None:
        if self.group < 16 or self.group % 16:
            raise FormatError(f"fp8 format: groups of {self.group}; a multiple of 16 is supported")

    @property
    def name(self) -> str:
        return f"fp8g{self.group}"

    @property
    def bits_per_weight(self) -> float:
        return 8 + 16 / self.group


WeightFormat = DenseFormat | AffineFormat | LookupFormat | Fp8Format


@dataclass(frozen=True)
class Weight:
    """A weight in canonical form.

    Dense: ``data`` has the weight's shape (any rank); fp32 as float32, fp16 as float16,
    bf16 as uint16 bit patterns.
    Others: ``data`` is uint8 codes ``[..., N, K]`` (a leading axis holds experts or heads),
    ``scale`` (and ``offset``, where the format has one) float32 ``[..., N, K // group]``.

    ``permutation`` int32 ``[K]`` is for checkpoints whose groups hold scattered features
    (act-order): column k of the codes multiplies feature ``permutation[k]`` of the input.
    """

    name: str
    format: WeightFormat
    data: npt.NDArray[np.generic]
    scale: F32 | None = None
    offset: F32 | None = None
    permutation: npt.NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        expected: npt.DTypeLike
        if isinstance(self.format, DenseFormat):
            expected = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}[
                self.format.dtype
            ]
        else:
            expected = np.uint8
        if self.data.dtype != expected:
            raise FormatError(
                f"weight {self.name}: data is {self.data.dtype}, format {self.format.name} "
                f"needs {np.dtype(expected)}"
            )
        if isinstance(self.format, DenseFormat):
            return
        if self.data.ndim < 2 or self.data.shape[-1] % self.format.group:
            raise FormatError(
                f"weight {self.name}: codes of shape {self.data.shape} do not divide into "
                f"groups of {self.format.group}"
            )
        groups = (*self.data.shape[:-1], self.data.shape[-1] // self.format.group)
        if self.scale is None or self.scale.shape != groups:
            raise FormatError(f"weight {self.name}: scales must have shape {groups}")
        wants_offset = isinstance(self.format, AffineFormat) and self.format.offset
        if wants_offset != (self.offset is not None):
            raise FormatError(f"weight {self.name}: offsets do not match {self.format.name}")
        if self.offset is not None and self.offset.shape != groups:
            raise FormatError(f"weight {self.name}: offsets must have shape {groups}")
        if self.permutation is not None and self.permutation.shape != self.data.shape[-1:]:
            raise FormatError(f"weight {self.name}: the permutation does not fit its columns")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def rows(self, index: int | slice | npt.NDArray[np.int64]) -> Weight:
        """A subset or permutation of the first axis (one entry of it: an integer); lossless."""
        return dataclasses.replace(
            self,
            data=self.data[index],
            scale=None if self.scale is None else self.scale[index],
            offset=None if self.offset is None else self.offset[index],
        )

    def reshape(self, *leading: int) -> Weight:
        """The same rows under other leading axes; the last axis (inputs) stays."""
        return dataclasses.replace(
            self,
            data=self.data.reshape(*leading, self.data.shape[-1]),
            scale=None if self.scale is None else self.scale.reshape(*leading, -1),
            offset=None if self.offset is None else self.offset.reshape(*leading, -1),
        )

    def dequantize(self) -> F32:
        """The meaning of the format, as float32, in the order of the inputs."""
        if isinstance(self.format, DenseFormat):
            return to_float32(self.data, self.format.dtype)
        assert self.scale is not None
        if isinstance(self.format, LookupFormat):
            values = np.asarray(self.format.table, np.float32)[self.data]
        elif isinstance(self.format, Fp8Format):
            values = E4M3[self.data]
        else:
            values = self.data.astype(np.float32) - np.float32(self.format.zero)
        grouped = values.reshape(*self.scale.shape, self.format.group)
        grouped = grouped * self.scale[..., None]
        if self.offset is not None:
            grouped = grouped + self.offset[..., None]
        out: F32 = grouped.reshape(self.data.shape)
        if self.permutation is not None:
            ordered = np.empty_like(out)
            ordered[..., self.permutation] = out
            return ordered
        return out


def stack(name: str, weights: Sequence[Weight]) -> Weight:
    """Weights of one format and shape along a new first axis (experts that are stored apart).

    Where zero points vary in some of them only, all get offsets.
    """
    if len({weight.format for weight in weights}) > 1:
        weights = [with_offset(weight) for weight in weights]
    first = weights[0]
    for other in weights[1:]:
        same = other.permutation is first.permutation or (
            other.permutation is not None
            and first.permutation is not None
            and np.array_equal(other.permutation, first.permutation)
        )
        if other.format != first.format or other.shape != first.shape or not same:
            raise FormatError(
                f"weight {other.name}: stored as {other.format.name} {list(other.shape)}, unlike "
                f"{first.name} beside it ({first.format.name} {list(first.shape)})"
            )

    def together(arrays: Sequence[npt.NDArray[Any] | None]) -> Any:
        return None if arrays[0] is None else np.stack([a for a in arrays if a is not None])

    return Weight(
        name,
        first.format,
        np.stack([w.data for w in weights]),
        together([w.scale for w in weights]),
        together([w.offset for w in weights]),
        first.permutation,
    )


def with_offset(weight: Weight) -> Weight:
    """The same weight with its zero point, where it is affine and has one, in its offsets."""
    form = weight.format
    if not isinstance(form, AffineFormat) or weight.scale is None:
        return weight
    shift = -weight.scale * np.float32(form.zero)
    return dataclasses.replace(
        weight,
        format=AffineFormat(form.bits, form.group, offset=True),
        offset=(shift if weight.offset is None else weight.offset + shift).astype(np.float32),
    )


def _e4m3() -> F32:
    """Every E4M3 number by its byte: 4 exponent bits of bias 7; only 0x7F and 0xFF are NaN."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    values = np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    values = np.where((codes & 127) == 127, np.nan, values)
    return np.where(codes >= 128, -values, values).astype(np.float32)


E4M3: F32 = _e4m3()
"""float32 values of the 256 codes of :class:`Fp8Format`."""


def to_float32(data: npt.NDArray[np.generic], dtype: FloatName) -> F32:
    """Widens stored floats exactly; bf16 is given as uint16 bit patterns."""
    if dtype == "bf16":
        return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return data.astype(np.float32)


def from_float32(values: F32, dtype: FloatName) -> npt.NDArray[np.generic]:
    """Narrows float32, rounding to nearest even; bf16 comes back as uint16 bit patterns."""
    if dtype == "fp16":
        return values.astype(np.float16)
    if dtype == "fp32":
        return np.ascontiguousarray(values, np.float32)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


def dense(name: str, values: F32, dtype: FloatName = "fp32") -> Weight:
    """A dense weight from float32 values."""
    return Weight(name, DenseFormat(dtype), from_float32(values, dtype))


def quantize_affine(
    name: str, values: F32, bits: int = 8, group: int = 32, *, offset: bool = False
) -> Weight:
    """Round-to-nearest quantisation of ``[N, K]``: symmetric, or min/max with an offset."""
    rows, columns = values.shape
    grouped = values.reshape(rows, columns // group, group).astype(np.float32)
    if offset:
        low = grouped.min(axis=2)
        scale = (grouped.max(axis=2) - low) / np.float32(2**bits - 1)
        zero = 0
    else:
        low = None
        zero = 2 ** (bits - 1)
        scale = np.abs(grouped).max(axis=2) / np.float32(zero - 1)
    safe = np.where(scale > 0, scale, np.float32(1))[:, :, None]
    shifted = grouped - low[:, :, None] if low is not None else grouped + zero * safe
    codes = np.clip(np.rint(shifted / safe), 0, 2**bits - 1).astype(np.uint8)
    return Weight(
        name,
        AffineFormat(bits, group, zero, offset),
        codes.reshape(rows, columns),
        scale.astype(np.float32),
        None if low is None else low.astype(np.float32),
    )
