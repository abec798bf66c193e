"""Fewer bits: the search against rounding to nearest, and what it must keep."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest

from sartor.ops import AffineFormat, dense, quantize_affine
from sartor.ops import requantize as module
from sartor.ops.requantize import GROUP, requantize
from sartor.ops.weights import F32


def rows(seed: int = 0) -> F32:
    """Plain rows, rows with a few large values, shifted and tiny ones, and ones on a grid."""
    rng = np.random.default_rng(seed)
    plain = rng.standard_normal((40, 96))
    return np.concatenate(
        [
            plain,
            rng.standard_t(2, (40, 96)),
            np.where(rng.random((40, 96)) < 0.03, 50 * plain, plain),
            7 + 0.1 * plain,
            1e-30 * plain,
            rng.integers(0, 4, (40, 96)),
        ]
    ).astype(np.float32)


def squares(values: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Their sums by group."""
    wide = values.astype(np.float64).reshape(-1, GROUP)
    out: npt.NDArray[np.float64] = np.square(wide).sum(axis=1)
    return out


@pytest.mark.parametrize("bits", range(2, 9))
def test_no_group_is_further_off_than_rounding_to_nearest(bits: int) -> None:
    values = rows()
    found = requantize(dense("w", values), bits, "head")
    assert (found.name, found.format) == ("head", AffineFormat(bits, GROUP, offset=True))
    assert found.data.max() == 2**bits - 1
    rounded = quantize_affine("w", values, bits, GROUP, offset=True)
    searched, nearest = (squares(w.dequantize() - values) for w in (found, rounded))
    # Two roundings of float32 in each value: where a grid holds all of them, nothing else is left.
    largest = np.abs(values).reshape(-1, GROUP).max(axis=1, keepdims=True).repeat(GROUP, axis=1)
    noise = squares(2 * np.finfo(np.float32).eps * largest.astype(np.float64))
    assert np.all(searched <= nearest * (1 + 1e-5) + noise)
    if bits < 6:  # clipping pays where steps are large
        plain = slice(0, 120)
        assert searched[plain].sum() < 0.9 * nearest[plain].sum()


def test_values_that_fit_are_kept() -> None:
    constant = np.full((2, 32), -3.25, np.float32)
    found = requantize(dense("w", constant), 4, "w")
    np.testing.assert_array_equal(found.dequantize(), constant)
    two = np.where(rows(1)[:40] > 0, np.float32(0.5), np.float32(-2))
    np.testing.assert_allclose(requantize(dense("w", two), 2, "w").dequantize(), two, rtol=1e-6)


def test_a_row_does_not_depend_on_the_rows_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    values = rows(2)
    whole = requantize(dense("w", values), 4, "w")
    monkeypatch.setattr(module, "_CHUNK", 5 * values.shape[1] + 1)
    parts = requantize(dense("w", values), 4, "w")
    for field in ("data", "scale", "offset"):
        np.testing.assert_array_equal(getattr(whole, field), getattr(parts, field))


def test_columns_come_out_in_the_order_of_the_inputs() -> None:
    order = np.random.default_rng(3).permutation(96).astype(np.int32)
    stored = quantize_affine("w", rows(3), 8, GROUP)
    shuffled = dataclasses.replace(stored, permutation=order)
    found = requantize(shuffled, 4, "w")
    assert found.permutation is None
    wanted = requantize(dense("w", shuffled.dequantize()), 4, "w")
    np.testing.assert_array_equal(found.dequantize(), wanted.dequantize())
