"""Operators and weight formats: what a backend implements, with its meaning in numpy."""

from sartor.ops.operators import CORE_OPERATORS, FUSED_OPERATORS, OPERATORS, Operator, operator
from sartor.ops.rope import RopeSpec
from sartor.ops.weights import (
    AffineFormat,
    DenseFormat,
    Fp8Format,
    LookupFormat,
    Weight,
    WeightFormat,
    dense,
    quantize_affine,
    stack,
)

__all__ = [
    "CORE_OPERATORS",
    "FUSED_OPERATORS",
    "OPERATORS",
    "AffineFormat",
    "DenseFormat",
    "Fp8Format",
    "LookupFormat",
    "Operator",
    "RopeSpec",
    "Weight",
    "WeightFormat",
    "dense",
    "operator",
    "quantize_affine",
    "stack",
]
