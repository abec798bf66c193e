"""Microscaling numbers: FP4 (E2M1) codes and E8M0 scales.

Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.3 and 5.4.1. GGUF's MXFP4
and the layout of GPT-OSS hold the same numbers in different places.
"""

from __future__ import annotations

import numpy as np

from sartor.ops.weights import F32, U8

FP4_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""The 16 values of E2M1 times two: integers, as a lookup table needs them."""


def e8m0(codes: U8) -> F32:
    """``2 ** (code - 127)``; 255 is NaN."""
    powers = np.ldexp(np.float32(1), np.arange(255) - 127)
    return np.append(powers, np.nan).astype(np.float32)[codes]


def halved_e8m0(codes: U8) -> F32:
    """``2 ** (code - 128)``, the scale of :data:`FP4_DOUBLED`: exact, the smallest are subnormal.

    255 is 2 ** 127: both readers of MXFP4 (ggml and transformers) give it no other meaning.
    """
    return np.ldexp(np.float32(1), np.arange(256) - 128).astype(np.float32)[codes]
