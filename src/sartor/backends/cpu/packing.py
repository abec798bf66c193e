"""Weights in the layout that the native kernels stream (native/core/packing.hpp).

Canonical codes stay as they are; scales and offsets become fp16 times a power of two, so they
keep a relative precision of 2^-11. A tensor whose scales span more than fp16 can hold is
widened to float32 instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sartor.backends.cpu import _native
from sartor.errors import UnsupportedError
from sartor.ops.weights import AffineFormat, DenseFormat, LookupFormat, Weight, dense

LAYOUT_VERSION = 1
"""Part of a packed file's identity: change it when the layout changes."""

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]


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

    @property
    def format_name(self) -> str:
        """The name of the weight format that the codes are kept in."""
        if not self.group:
            return self.storage
        return f"{self.storage}{self.bits}g{self.group}{'' if self.offsets is None else 'o'}"

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.codes, self.scales, self.offsets) if a is not None)

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
        )


def pack_matrix(pool: Any, weight: Weight) -> PackedMatrix:
    """Packs a canonical weight ``[N, K]``; UnsupportedError names a format it cannot hold."""
    if isinstance(weight.format, DenseFormat):
        return _pack_dense(pool, weight)
    if weight.format.group != 16 and weight.format.group % _native.CHUNK:
        raise UnsupportedError(
            f"weight {weight.name}: the CPU backend has no kernel for groups of "
            f"{weight.format.group}; 16 and multiples of {_native.CHUNK} are supported"
        )
    packed = _pack_codes(pool, weight, weight.format)
    if packed is not None:
        return packed
    return _pack_dense(pool, dense(weight.name, weight.dequantize()))


def _pack_dense(pool: Any, weight: Weight) -> PackedMatrix:
    assert isinstance(weight.format, DenseFormat)
    n, k = weight.shape
    k_padded = _padded(k, _native.CHUNK)
    element = weight.data.itemsize
    codes = np.empty(_padded(n, _native.LANES) * k_padded * element, np.uint8)
    source = np.ascontiguousarray(weight.data).reshape(-1).view(np.uint8)
    _native.pack_dense(pool, source, n, k, k_padded, element, codes)
    return PackedMatrix(weight.format.dtype, n, k, k_padded, codes)


def _pack_codes(
    pool: Any, weight: Weight, form: AffineFormat | LookupFormat
) -> PackedMatrix | None:
    n, k = weight.shape
    assert weight.scale is not None
    lookup = isinstance(form, LookupFormat)
    bits = 4 if isinstance(form, LookupFormat) else form.bits
    zero = 0 if isinstance(form, LookupFormat) else form.zero
    k_padded = _padded(k, math.lcm(_native.CHUNK, form.group))
    groups = k_padded // form.group
    scales, scale_multiplier = _pack_scales(weight.scale, n, groups)
    offsets, offset_multiplier = None, 1.0
    if weight.offset is not None:
        offsets, offset_multiplier = _pack_scales(weight.offset, n, groups)
    if scales is None or (weight.offset is not None and offsets is None):
        return None
    codes = np.empty(_padded(n, _native.LANES) * k_padded * bits // 8, np.uint8)
    _native.pack_codes(pool, np.ascontiguousarray(weight.data), n, k, k_padded, bits, zero, codes)
    return PackedMatrix(
        "lookup" if lookup else "affine",
        n,
        k,
        k_padded,
        codes,
        scales,
        offsets,
        bits,
        form.group,
        128 if lookup else zero,  # the table's signed values are shifted to unsigned bytes
        scale_multiplier,
        offset_multiplier,
        form.table if isinstance(form, LookupFormat) else (),
    )


def _pack_scales(values: npt.NDArray[np.float32], n: int, groups: int) -> tuple[U16 | None, float]:
    """fp16 values and their common power of two; None where fp16 is too narrow."""
    top = float(np.abs(values).max(initial=0.0))
    if not math.isfinite(top):
        return None, 1.0
    exponent = 0 if top == 0 else 15 - math.frexp(top)[1]  # the largest lands in [2^14, 2^15)
    exponent = max(-100, min(exponent, 100))
    out = np.empty(_padded(n, _native.LANES) * groups, np.uint16)
    source = np.ascontiguousarray(values, np.float32)
    lost = _native.pack_scales(source, n, values.shape[1], groups, 2.0**exponent, out)
    return (out, 2.0**-exponent) if lost == 0 else (None, 1.0)


def _padded(value: int, to: int) -> int:
    return -(-value // to) * to
