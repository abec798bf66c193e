"""Weight formats and the operator table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sartor.errors import FormatError, UsageError
from sartor.ops import (
    CORE_OPERATORS,
    FUSED_OPERATORS,
    OPERATORS,
    AffineFormat,
    DenseFormat,
    LookupFormat,
    Weight,
    dense,
    functions,
    operator,
    quantize_affine,
)
from sartor.ops.weights import from_float32, to_float32


@given(st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=20))
def test_bfloat16_rounds_as_torch_does(values: list[float]) -> None:
    array = np.array(values, np.float32)
    found = to_float32(from_float32(array, "bf16"), "bf16")
    wanted = torch.tensor(array).to(torch.bfloat16).to(torch.float32).numpy()
    assert np.array_equal(found, wanted, equal_nan=True)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("group", [16, 32])
def test_quantising_stays_within_half_a_step(bits: int, offset: bool, group: int) -> None:
    values = np.random.default_rng(bits).standard_normal((5, 64)).astype(np.float32)
    if bits == 2 and not offset:
        values = np.clip(values, -1, 1)
    weight = quantize_affine("w", values, bits, group, offset=offset)
    assert weight.shape == values.shape
    assert weight.data.max() < 2**bits
    assert weight.scale is not None
    step = np.repeat(weight.scale, group, axis=1)
    assert np.all(np.abs(weight.dequantize() - values) <= 0.501 * step + 1e-6)


def test_constant_groups_quantise_without_a_step() -> None:
    values = np.full((2, 32), 3.0, np.float32)
    np.testing.assert_array_equal(quantize_affine("w", values, offset=True).dequantize(), values)
    zeros = np.zeros((2, 32), np.float32)
    assert not quantize_affine("w", zeros).dequantize().any()


def test_affine_meaning() -> None:
    codes = np.arange(32, dtype=np.uint8).reshape(1, 32) % 16
    weight = Weight(
        "w",
        AffineFormat(4, 16, zero=8, offset=True),
        codes,
        np.array([[0.5, 2.0]], np.float32),
        np.array([[1.0, -1.0]], np.float32),
    )
    wanted = np.concatenate([0.5 * (codes[0, :16] - 8.0) + 1, 2 * (codes[0, 16:] - 8.0) - 1])
    np.testing.assert_array_equal(weight.dequantize()[0], wanted)


def test_lookup_meaning() -> None:
    table = tuple(range(-8, 8))
    weight = Weight(
        "w",
        LookupFormat(table, 16),
        np.arange(16, dtype=np.uint8)[None],
        np.array([[0.25]], np.float32),
    )
    np.testing.assert_array_equal(weight.dequantize()[0], np.array(table) * 0.25)


@pytest.mark.parametrize(
    "weight",
    [
        dense("w", np.random.default_rng(0).standard_normal((6, 32)).astype(np.float32), "bf16"),
        quantize_affine("w", np.random.default_rng(0).standard_normal((6, 32)).astype(np.float32)),
        quantize_affine(
            "w", np.random.default_rng(0).standard_normal((6, 32)).astype(np.float32), offset=True
        ),
    ],
)
def test_rows_are_lossless(weight: Weight) -> None:
    order = np.array([5, 0, 3, 3])
    assert np.array_equal(weight.rows(order).dequantize(), weight.dequantize()[order])


def test_bits_per_weight() -> None:
    assert DenseFormat("bf16").bits_per_weight == 16
    assert AffineFormat(4, 32, 8).bits_per_weight == 4.5
    assert AffineFormat(4, 32, offset=True).bits_per_weight == 5
    assert LookupFormat((0,) * 16, 32).bits_per_weight == 4.5


def test_malformed_weights_are_named() -> None:
    scale = np.ones((2, 1), np.float32)
    codes = np.zeros((2, 32), np.uint8)
    for build, message in (
        (lambda: AffineFormat(9, 32), "9 bits"),
        (lambda: AffineFormat(4, 24), "groups of 24"),
        (lambda: AffineFormat(4, 32, 16), "zero point 16"),
        (lambda: LookupFormat((0,) * 15, 32), "16 entries"),
        (lambda: Weight("odd", DenseFormat("fp32"), codes), "odd.*uint8"),
        (lambda: Weight("odd", AffineFormat(4, 32), codes[:, :20], scale), "odd.*groups of 32"),
        (lambda: Weight("odd", AffineFormat(4, 32), codes, scale[:1]), "odd: scales"),
        (lambda: Weight("odd", AffineFormat(4, 32), codes, scale, scale), "odd: offsets"),
        (lambda: Weight("odd", AffineFormat(4, 32, offset=True), codes, scale), "odd: offsets"),
    ):
        with pytest.raises(FormatError, match=message):
            build()


def test_every_stateless_operator_has_a_function() -> None:
    apart = {"rope", "kv_write", "attention", "sample"}
    for name in set(CORE_OPERATORS) - apart:
        assert callable(getattr(functions, name)), name
    assert set(CORE_OPERATORS) | set(FUSED_OPERATORS) == set(OPERATORS)
    for name in FUSED_OPERATORS:
        assert set(operator(name).fused) <= set(CORE_OPERATORS)


def test_unknown_operator_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'matmul' is unknown.*linear.*rms_norm"):
        operator("matmul")


@pytest.mark.parametrize(
    ("name", "shapes", "attributes"),
    [
        ("add", [("T", 4), ("T", 5)], {}),
        ("linear", [("T", 4), (3, 5)], {}),
        ("linear", [("T", 4), (3, 4), (4,)], {}),
        ("rms_norm", [("T", 10), (4,)], {}),
        ("gated_activation", [("T", 4), ("T", 4)], {"kind": "tanhh"}),
        ("attention", [("T", 30)], {"heads": 4, "value_dim": 8, "head_dim": 8}),
        ("linear_group", [("T", 4), (3, 4), (3, 4)], {"biases": [False]}),
        ("add_rms_norm", [("T", 4), ("T", 4), (3,)], {}),
    ],
)
def test_shapes_that_do_not_fit(
    name: str, shapes: list[tuple[int | str, ...]], attributes: dict[str, object]
) -> None:
    with pytest.raises(UsageError):
        operator(name).infer(shapes, attributes)


def test_shapes_that_fit() -> None:
    assert operator("linear").infer([("T", 4), (3, 4), (3,)], {}) == (("T", 3),)
    assert operator("gather_rows").infer([("T", 4), ("R",)], {}) == (("R", 4),)
    group = operator("linear_group").infer(
        [("T", 4), (3, 4), (3,), (2, 4)], {"biases": [True, False]}
    )
    assert group == (("T", 3), ("T", 2))
    assert operator("sample").infer([("R", 9)], {}) == (("R",),)
