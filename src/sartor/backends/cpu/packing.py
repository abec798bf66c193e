"""Weights in the layout that the native kernels stream (native/core/packing.hpp).

Canonical codes stay as they are; scales and offsets become fp16 times a power of two, so they
keep a relative precision of 2^-11. A tensor whose scales span more than fp16 can hold is
widened to float32 instead.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sartor.backends.cpu import _native
from sartor.ops.weights import (
    AffineFormat,
    DenseFormat,
    Fp8Format,
    LookupFormat,
    Weight,
    dense,
    with_offset,
)

LAYOUT_VERSION = 2
"""Part of a packed file's identity: change it when the layout changes."""

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
I32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PackedMatrix:
    """One matrix as the kernels read it; see ``Matrix`` in native/core/kernels.hpp."""

    storage: str
    n: int
    k: int
    k_padded: int
    codes: U8
    scales: U16 | None = None
    offsets: U16 | None = None
    bits: int = 0
    group: int = 0
    zero: int = 0
    scale_multiplier: float = 1.0
    offset_multiplier: float = 1.0
    table: tuple[int, ...] = ()
    experts: int = 1
    permutation: I32 | None = None

    @property
    def format_name(self) -> str:
        """The name of the weight format that the codes are kept in."""
        if not self.group:
            return self.storage
        if self.storage == "fp8":
            return f"fp8g{self.group}"
        return f"{self.storage}{self.bits}g{self.group}{'' if self.offsets is None else 'o'}"

    @property
    def integer_codes(self) -> bool:
        return self.storage in ("affine", "lookup")

    @property
    def nbytes(self) -> int:
        return sum(
            a.nbytes
            for a in (self.codes, self.scales, self.offsets, self.permutation)
            if a is not None
        )

    def native(self) -> Any:
        """The native view; it keeps the arrays alive."""
        return _native.matrix(
            self.storage,
            self.n,
            self.k,
            self.k_padded,
            self.codes,
            self.scales,
            self.offsets,
            self.bits,
            self.group,
            self.zero,
            self.scale_multiplier,
            self.offset_multiplier,
            list(self.table),
            self.experts,
            self.permutation,
        )


def pack_matrix(pool: Any, weight: Weight) -> PackedMatrix:
    """Packs a canonical weight ``[N, K]``, or ``[experts, N, K]``.

    Groups of a length that no kernel has are cut into groups of 16 of equal scale.
    """
    if weight.offset is not None and isinstance(weight.format, AffineFormat):
        weight = with_offset(weight)  # the kernels know a zero point or offsets, not both
    if isinstance(weight.format, DenseFormat):
        return _pack_dense(pool, weight, weight.format.dtype)
    if weight.format.group != 16 and weight.format.group % _native.CHUNK:
        weight = _regrouped(weight, 16)
    packed = _pack_scaled(pool, weight)
    if packed is not None:
        return packed
    return _pack_dense(pool, dense(weight.name, weight.dequantize()), "fp32")


def _regrouped(weight: Weight, group: int) -> Weight:
    """The same weight with every group cut into smaller ones."""
    assert not isinstance(weight.format, DenseFormat)
    repeats = weight.format.group // group
    return dataclasses.replace(
        weight,
        format=dataclasses.replace(weight.format, group=group),
        scale=None if weight.scale is None else np.repeat(weight.scale, repeats, axis=-1),
        offset=None if weight.offset is None else np.repeat(weight.offset, repeats, axis=-1),
    )


def _parts(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """``[experts, N, columns]``, whatever the leading axes are."""
    return array.reshape(-1, *array.shape[-2:])


def _pack_dense(pool: Any, weight: Weight, storage: str) -> PackedMatrix:
    """Dense weights, and the codes of eight-bit floats."""
    parts = _parts(weight.data)
    experts, n, k = parts.shape
    group = 1 if isinstance(weight.format, DenseFormat) else weight.format.group
    k_padded = _padded(k, math.lcm(_native.CHUNK, group))
    element = weight.data.itemsize
    codes = np.empty((experts, _padded(n, _native.LANES) * k_padded * element), np.uint8)
    for part, out in zip(parts, codes, strict=True):
        source = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        _native.pack_dense(pool, source, n, k, k_padded, element, out)
    return PackedMatrix(storage, n, k, k_padded, codes.reshape(-1), experts=experts)


def _pack_scaled(pool: Any, weight: Weight) -> PackedMatrix | None:
    """Codes with scales by group; None where fp16 cannot hold the scales."""
    form = weight.format
    assert not isinstance(form, DenseFormat)
    assert weight.scale is not None
    experts, n, k = _parts(weight.data).shape
    k_padded = _padded(k, math.lcm(_native.CHUNK, form.group))
    scales, scale_multiplier = _pack_scales(weight.scale, k_padded // form.group)
    offsets, offset_multiplier = None, 1.0
    if weight.offset is not None:
        offsets, offset_multiplier = _pack_scales(weight.offset, k_padded // form.group)
    if scales is None or (weight.offset is not None and offsets is None):
        return None
    common: dict[str, Any] = {
        "group": form.group,
        "scales": scales,
        "offsets": offsets,
        "scale_multiplier": scale_multiplier,
        "offset_multiplier": offset_multiplier,
        "permutation": weight.permutation,
    }
    if isinstance(form, Fp8Format):
        return dataclasses.replace(_pack_dense(pool, weight, "fp8"), bits=8, **common)
    lookup = isinstance(form, LookupFormat)
    bits = 4 if isinstance(form, LookupFormat) else form.bits
    zero = 0 if isinstance(form, LookupFormat) else form.zero
    codes = np.empty((experts, _padded(n, _native.LANES) * k_padded * bits // 8), np.uint8)
    for part, out in zip(_parts(weight.data), codes, strict=True):
        _native.pack_codes(pool, np.ascontiguousarray(part), n, k, k_padded, bits, zero, out)
    return PackedMatrix(
        "lookup" if lookup else "affine",
        n,
        k,
        k_padded,
        codes.reshape(-1),
        bits=bits,
        zero=128 if lookup else zero,  # the table's signed values are shifted to unsigned bytes
        table=form.table if isinstance(form, LookupFormat) else (),
        experts=experts,
        **common,
    )


def _pack_scales(values: npt.NDArray[np.float32], groups: int) -> tuple[U16 | None, float]:
    """fp16 values and their common power of two; None where fp16 is too narrow."""
    top = float(np.abs(values).max(initial=0.0))
    if not math.isfinite(top):
        return None, 1.0
    exponent = 0 if top == 0 else 15 - math.frexp(top)[1]  # the largest lands in [2^14, 2^15)
    exponent = max(-100, min(exponent, 100))
    parts = _parts(values)
    experts, n, stored = parts.shape
    out = np.empty((experts, _padded(n, _native.LANES) * groups), np.uint16)
    for part, to in zip(parts, out, strict=True):
        source = np.ascontiguousarray(part, np.float32)
        if _native.pack_scales(source, n, stored, groups, 2.0**exponent, to):
            return None, 1.0
    return out.reshape(-1), 2.0**-exponent


def _padded(value: int, to: int) -> int:
    return -(-value // to) * to
