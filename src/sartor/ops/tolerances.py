"""How far a backend may be from the numpy meaning: one table, derived and not tuned.

A tolerance is relative to the largest magnitude of the reference result. Each term is a
rounding step: of float32 sums, of fp16 scales, of int8 activations.
"""

from __future__ import annotations

import math

FP32_STEP = 2.0**-24
FP16_STEP = 2.0**-11
BF16_STEP = 2.0**-9

ELEMENTWISE = 64 * FP32_STEP
"""A few roundings, and exp or tanh by polynomial instead of the library's."""

NORM = 64 * FP32_STEP
"""A float32 sum over a row in another order, and a square root."""

ROPE = 64 * FP32_STEP
"""Cosines and sines of two libraries, for positions below a hundred."""

ATTENTION = 256 * FP32_STEP
"""Scores, exponentials and a weighted sum in another order; the state is rounded alike."""

ATTENTION_BF16 = 4 * BF16_STEP
"""Queries and weights rounded to bf16 for dot products with a bf16 state: a step of each weight,
and of each score, which are of the order of one, times its size."""

WIDE_STEP = 0.5 / (127 * 257)
"""Half a step of the whole numbers that queries and weights become over an int8 state."""

SHORT_EXP2 = 7e-5
"""Powers of two by a polynomial of third degree, for weights that are rounded after it."""

ATTENTION_INT8 = 8 * WIDE_STEP + 2 * SHORT_EXP2
"""The state is rounded alike, to codes with a scale. What is left: half a step of a query's largest
feature in each product of a score, and of the largest weight in each of the others, of random sign;
and each weight's power of two, in the sum and in the total."""

ATTENTION_OVER = {
    "fp32": ATTENTION,
    "fp16": ATTENTION,
    "bf16": ATTENTION_BF16,
    "int8": ATTENTION_INT8,
}
"""By storage of the state."""

SCAN = 256 * FP32_STEP
"""A recurrence over a dozen tokens, each step rounding a few sums."""

PACKED_SCALE = FP16_STEP
"""A scale or an offset that a backend keeps as fp16."""


def linear(inputs: int, *, int8: bool) -> float:
    """A dot product over ``inputs`` terms, relative to the largest result.

    Sums of random sign lose about sqrt(inputs) steps. Both sides quantise activations by the
    same rule, but a value that sits on a rounding boundary may fall either way: one step of
    1/127 in one of ``inputs`` terms.
    """
    tolerance = 4 * math.sqrt(inputs) * FP32_STEP
    return tolerance + 1 / 127 / math.sqrt(inputs) if int8 else tolerance
