"""Rotary position embedding: frequencies of every variant, and the rotation itself.

A :class:`RopeSpec` is part of a program. Variants whose frequencies depend on the length of
the sequence take a length that is fixed at admission (prompt + longest output), so that an
answer does not change while it is written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from sartor.errors import UnsupportedError

F32 = npt.NDArray[np.float32]
RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding of the first ``dim`` features of a head.

    kind            "default"; "linear" (position interpolation); "dynamic" (NTK by length);
                    "yarn" (arXiv:2309.00071); "llama3" (Llama 3.1's by-part interpolation);
                    "longrope" (arXiv:2402.13753: searched divisors, one set a length)
    theta           base of the frequencies
    factor          stretch of the context; its meaning depends on the kind
    original_context  context of the pre-training, in tokens (dynamic, yarn, llama3, longrope)
    attention_factor  multiplies cos and sin; 0 derives it from ``factor`` (yarn, longrope)
    interleaved     pairs are (0, 1), (2, 3), ... instead of (0, dim/2), (1, dim/2 + 1), ...
    frequencies     explicit divisors a pair (GGUF's ``rope_freqs``); empty for none
    short_factors, long_factors  divisors a pair for sequences that fit into
                    ``original_context``, and for longer ones (longrope)
    """

    dim: int
    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    interleaved: bool = False
    frequencies: tuple[float, ...] = ()
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise UnsupportedError(
                f"rope type {self.kind!r} is not implemented; known are {', '.join(ROPE_KINDS)}"
            )
        if self.dim <= 0 or self.dim % 2:
            raise UnsupportedError(f"rope over {self.dim} features; an even number is needed")
        if self.kind == "longrope" and not (
            len(self.short_factors) == len(self.long_factors) == self.dim // 2
        ):
            raise UnsupportedError(
                f"longrope over {self.dim} features needs {self.dim // 2} short and as many long "
                f"factors, not {len(self.short_factors)} and {len(self.long_factors)}"
            )

    @property
    def depends_on_length(self) -> bool:
        return self.kind in ("dynamic", "longrope")


def inverse_frequencies(spec: RopeSpec, length: int = 0) -> F32:
    """Radians a position of each pair: float32 ``[dim / 2]``.

    ``length`` matters for kinds that :attr:`RopeSpec.depends_on_length`.
    """
    exponents = np.arange(0, spec.dim, 2, dtype=np.float64) / spec.dim
    theta = spec.theta
    if spec.kind == "dynamic":
        stretched = max(length, spec.original_context)
        theta *= (spec.factor * stretched / spec.original_context - (spec.factor - 1)) ** (
            spec.dim / (spec.dim - 2)
        )
    frequencies = 1.0 / theta**exponents
    if spec.kind == "linear":
        frequencies = frequencies / spec.factor
    elif spec.kind == "llama3":
        frequencies = _llama3(spec, frequencies)
    elif spec.kind == "yarn":
        frequencies = _yarn(spec, frequencies)
    elif spec.kind == "longrope":
        long = length > spec.original_context
        frequencies = frequencies / np.asarray(spec.long_factors if long else spec.short_factors)
    if spec.frequencies:
        frequencies = frequencies / np.asarray(spec.frequencies, np.float64)
    return frequencies.astype(np.float32)


def attention_factor(spec: RopeSpec) -> float:
    """What cos and sin are multiplied by: 1 except for YaRN (paper, section 3.4) and LongRoPE
    (as Phi-3 has it, with either set of divisors)."""
    if spec.attention_factor:
        return spec.attention_factor
    if spec.kind == "longrope" and spec.factor > 1:
        return math.sqrt(1 + math.log(spec.factor) / math.log(spec.original_context))
    if spec.kind != "yarn":
        return 1.0
    if spec.mscale and spec.mscale_all_dim:
        return _mscale(spec.factor, spec.mscale) / _mscale(spec.factor, spec.mscale_all_dim)
    return _mscale(spec.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _llama3(spec: RopeSpec, frequencies: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    wavelength = 2 * math.pi / frequencies
    low = spec.original_context / spec.low_freq_factor
    high = spec.original_context / spec.high_freq_factor
    span = spec.high_freq_factor - spec.low_freq_factor
    smooth = (spec.original_context / wavelength - spec.low_freq_factor) / span
    blended = (1 - smooth) * frequencies / spec.factor + smooth * frequencies
    result = np.where(wavelength > low, frequencies / spec.factor, frequencies)
    return np.where((wavelength <= low) & (wavelength >= high), blended, result)


def _yarn(spec: RopeSpec, frequencies: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    def correction(rotations: float) -> float:
        turns = spec.original_context / (rotations * 2 * math.pi)
        return spec.dim * math.log(turns) / (2 * math.log(spec.theta))

    low, high = correction(spec.beta_fast), correction(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = np.clip((np.arange(spec.dim // 2) - low) / (high - low), 0, 1)
    blended: npt.NDArray[np.float64] = frequencies / spec.factor * ramp + frequencies * (1 - ramp)
    return blended


def cos_sin(
    spec: RopeSpec, positions: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32]
) -> tuple[F32, F32]:
    """Cosines and sines of each token: float32 ``[T, dim / 2]`` both.

    ``lengths[t]`` is the admitted length of token t's sequence.
    """
    if spec.depends_on_length:
        inverse = np.stack([inverse_frequencies(spec, int(n)) for n in lengths])
    else:
        inverse = inverse_frequencies(spec)[None, :]
    angles = positions.astype(np.float32)[:, None] * inverse
    factor = np.float32(attention_factor(spec))
    return (np.cos(angles) * factor).astype(np.float32), (np.sin(angles) * factor).astype(
        np.float32
    )


def rotate(x: F32, cos: F32, sin: F32, dim: int, interleaved: bool) -> F32:
    """Rotates the first ``dim`` features of ``[T, heads, head_dim]``; the rest pass through."""
    half = dim // 2
    first = slice(0, dim, 2) if interleaved else slice(0, half)
    second = slice(1, dim, 2) if interleaved else slice(half, dim)
    out = x.copy()
    c, s = cos[:, None, :], sin[:, None, :]
    out[..., first] = x[..., first] * c - x[..., second] * s
    out[..., second] = x[..., second] * c + x[..., first] * s
    return out
