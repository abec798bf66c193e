"""Weight formats and the operator table."""

from __future__ import annotations

import dataclasses

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
    Fp8Format,
    LookupFormat,
    Weight,
    dense,
    experts,
    functions,
    operator,
    quantize_affine,
    recurrent,
    stack,
)
from sartor.ops.weights import E4M3, from_float32, to_float32


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


def test_e4m3_is_torch_s() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(E4M3, codes.view(torch.float8_e4m3fn).float().numpy())


def test_fp8_meaning() -> None:
    codes = np.arange(64, dtype=np.uint8).reshape(2, 32)
    scale = np.array([[0.5, 2.0], [1.0, 3.0]], np.float32)
    weight = Weight("w", Fp8Format(16), codes, scale)
    np.testing.assert_array_equal(weight.dequantize(), E4M3[codes] * np.repeat(scale, 16, axis=1))
    assert Fp8Format(128).bits_per_weight == 8.125


def _act_order(order: np.ndarray, seed: int = 0) -> Weight:
    values = np.random.default_rng(seed).standard_normal((6, 32)).astype(np.float32)
    plain = quantize_affine("w", values, 4, 16, offset=True)
    return dataclasses.replace(plain, permutation=order.astype(np.int32))


def test_a_permutation_puts_columns_in_the_order_of_the_inputs() -> None:
    order = np.random.default_rng(1).permutation(32)
    weight = _act_order(order)
    plain = dataclasses.replace(weight, permutation=None).dequantize()
    for column in range(32):
        np.testing.assert_array_equal(weight.dequantize()[:, order[column]], plain[:, column])
    x = np.random.default_rng(2).standard_normal((3, 32)).astype(np.float32)
    np.testing.assert_allclose(
        functions.linear(x, weight), x @ weight.dequantize().T, rtol=1e-5, atol=1e-5
    )


def test_experts_stack_reshape_and_come_apart_without_loss() -> None:
    order = np.random.default_rng(1).permutation(32)
    weights = [_act_order(order, seed) for seed in range(3)]
    whole = stack("experts", weights)
    assert whole.shape == (3, 6, 32)
    assert whole.reshape(9, 2).shape == (9, 2, 32)
    for index, weight in enumerate(weights):
        np.testing.assert_array_equal(whole.rows(index).dequantize(), weight.dequantize())
        folded = whole.reshape(18).rows(slice(6 * index, 6 * index + 6))
        np.testing.assert_array_equal(folded.dequantize(), weight.dequantize())
    for other in (_act_order(order[::-1]), weights[0].rows(slice(3))):
        with pytest.raises(FormatError, match="unlike"):
            stack("experts", [weights[0], dataclasses.replace(other, name="odd")])


def test_malformed_weights_are_named() -> None:
    scale = np.ones((2, 1), np.float32)
    codes = np.zeros((2, 32), np.uint8)
    for build, message in (
        (lambda: AffineFormat(9, 32), "9 bits"),
        (lambda: AffineFormat(4, 24), "groups of 24"),
        (lambda: AffineFormat(4, 32, 16), "zero point 16"),
        (lambda: LookupFormat((0,) * 15, 32), "16 entries"),
        (lambda: Fp8Format(8), "groups of 8"),
        (lambda: Weight("odd", DenseFormat("fp32"), codes), "odd.*uint8"),
        (lambda: dataclasses.replace(_act_order(np.arange(31)), name="odd"), "permutation"),
        (lambda: Weight("odd", AffineFormat(4, 32), codes[:, :20], scale), "odd.*groups of 32"),
        (lambda: Weight("odd", AffineFormat(4, 32), codes, scale[:1]), "odd: scales"),
        (lambda: Weight("odd", AffineFormat(4, 32), codes, scale, scale), "odd: offsets"),
        (lambda: Weight("odd", AffineFormat(4, 32, offset=True), codes, scale), "odd: offsets"),
    ):
        with pytest.raises(FormatError, match=message):
            build()


def test_every_stateless_operator_has_a_function() -> None:
    on_state = {"kv_write", "attention", "self_attention", "latent_write", "latent_attention"}
    homes = (functions, experts, recurrent)
    for name in set(CORE_OPERATORS) - on_state - {"rope", "sample"}:
        assert any(callable(getattr(home, name, None)) for home in homes), name
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
        ("mul", [("T", 4), (5,)], {}),
        ("l2_norm", [("T", 10)], {"run": 4, "eps": 0.0}),
        ("split", [("T", 10)], {"widths": (3, 4), "runs": 1}),
        ("concat", [("T", 6), ("R", 6)], {"runs": 2}),
        ("replace_rows", [("T", 4), ("M",), ("M", 5)], {}),
        ("pool", [("T", 4)], {"kind": "max"}),
        ("grouped_linear", [("T", 4), ("T", 2), (3, 6, 5)], {}),
        ("grouped_linear", [("T", 4), ("T", 2), (3, 6, 4), (3, 5)], {}),
        ("head_linear", [("T", 8), (3, 6, 4)], {}),
        ("combine_experts", [("T", 7), ("T", 2)], {}),
        ("short_conv", [("T", 4), (5, 3)], {"state": 0}),
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


def test_a_stack_of_constant_and_varying_zero_points_has_offsets() -> None:
    rng = np.random.default_rng(5)
    values = rng.standard_normal((2, 4, 32)).astype(np.float32)
    plain = quantize_affine("plain", values[0], 4, 32)
    varying = quantize_affine("varying", values[1], 4, 32, offset=True)
    both = stack("both", [plain, varying])
    assert both.format == AffineFormat(4, 32, offset=True)
    wanted = np.stack([plain.dequantize(), varying.dequantize()])
    np.testing.assert_allclose(both.dequantize(), wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(FormatError, match="unlike plain beside it"):
        stack("both", [plain, quantize_affine("other", values[1], 5, 32)])
