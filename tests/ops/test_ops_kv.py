"""What an int8 state keeps of a key or a value."""

from __future__ import annotations

import numpy as np
import pytest

from sartor.ops.kv import LIMIT, dequantize_vectors, quantize_vectors, vector_bytes


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_a_vector_is_near_what_was_written(size: float) -> None:
    x = (np.random.default_rng(1).standard_normal((50, 3, 64)) * size).astype(np.float32)
    codes, scales = quantize_vectors(x)
    assert (codes.dtype, scales.dtype, scales.shape) == (np.int8, np.float16, (50, 3))
    assert np.abs(codes.astype(int)).max(axis=-1).min() == LIMIT
    # Half a step, and of the largest what fp16 takes from the scale.
    step = np.abs(x).max(axis=-1, keepdims=True) / LIMIT
    assert (np.abs(dequantize_vectors(codes, scales) - x) <= 0.57 * step).all()


def test_each_head_has_its_own_scale() -> None:
    x = np.array([[[1.0, -0.5], [1000.0, 10.0]]], np.float32)
    codes, scales = quantize_vectors(x)
    assert codes.tolist() == [[[127, -64], [127, 1]]]
    assert scales[0, 1] > 900 * scales[0, 0]


def test_zeros_and_what_is_too_small_read_as_zero() -> None:
    x = np.zeros((3, 16), np.float32)
    x[1] = 1e-7
    codes, scales = quantize_vectors(x)
    assert not codes.any()
    assert not scales.any()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 1e30])
def test_what_is_not_finite_reads_as_not_finite(bad: float) -> None:
    x = np.ones((2, 16), np.float32)
    x[0, 5] = bad
    found = dequantize_vectors(*quantize_vectors(x))
    assert not np.isfinite(found[0]).any()
    assert np.isfinite(found[1]).all()


def test_bytes_of_a_vector() -> None:
    assert [vector_bytes(kv, 64) for kv in ("fp32", "fp16", "bf16", "int8")] == [256, 128, 128, 66]
