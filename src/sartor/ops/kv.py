"""How the state keeps keys and values: what is stored of a vector, and what is read of it.

``int8``: of each vector (one token, one kv head, a key or a value) signed codes and one scale in
fp16. A scale has to be read with every 64 to 256 codes, so two bytes matter; fp16 is exact enough,
as the codes are of the *stored* scale, and every backend converts it already, for weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from sartor.ops.weights import F32

I8 = npt.NDArray[np.int8]
F16 = npt.NDArray[np.float16]

ELEMENT_BYTES: Mapping[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
"""Of one number of keys and values, by the plan's ``kv``."""

SCALE_BYTES = 2
"""Of a vector's scale, where it has one."""

LIMIT = 127
"""The largest code."""


def vector_bytes(kv: str, features: int) -> int:
    """Bytes of one key or value."""
    return features * ELEMENT_BYTES[kv] + (SCALE_BYTES if kv == "int8" else 0)


def quantize_vectors(x: F32) -> tuple[I8, F16]:
    """Codes ``[..., features]`` and scales ``[...]``: ``x`` is about ``codes * scales``.

    Rounds half to even. Zeros where the scale is below what fp16 holds; a vector with anything
    that is not finite, or beyond 8.3 million, reads as not finite.
    """
    finite = np.isfinite(x).all(axis=-1)
    with np.errstate(over="ignore", invalid="ignore"):
        top = np.where(finite, np.abs(x).max(axis=-1), np.float32("nan"))
        scales = (top / np.float32(LIMIT)).astype(np.float16)
        wide = scales.astype(np.float32)
        inverse = np.where(wide > 0, np.float32(1) / np.where(wide > 0, wide, 1), np.float32(0))
        codes = np.rint(x * inverse[..., None]).clip(-LIMIT, LIMIT).astype(np.int8)
    return codes, scales


def dequantize_vectors(codes: I8, scales: F16) -> F32:
    """What attention reads: float32 ``[..., features]``."""
    with np.errstate(invalid="ignore"):
        found: F32 = codes.astype(np.float32) * scales.astype(np.float32)[..., None]
    return found
