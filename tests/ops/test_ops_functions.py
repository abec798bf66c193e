"""Every operator function against torch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sartor.ops import dense, functions, quantize_affine

RNG = np.random.default_rng(3)


def _array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def _close(found: np.ndarray, wanted: torch.Tensor, tolerance: float = 2e-6) -> None:
    assert found.dtype == np.float32
    assert found.shape == tuple(wanted.shape)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=tolerance, atol=tolerance)


def test_embedding() -> None:
    table, ids = _array(7, 5), np.array([3, 0, 6, 3], np.int32)
    wanted = F.embedding(torch.tensor(ids), torch.tensor(table)) * 2.5
    _close(functions.embedding(ids, dense("t", table), scale=2.5), wanted)


def test_linear() -> None:
    x, w, b = _array(4, 32), _array(6, 32), _array(6)
    wanted = F.linear(torch.tensor(x), torch.tensor(w), torch.tensor(b))
    _close(functions.linear(x, dense("w", w), b), wanted)
    # Quantised inputs leave dense weights alone.
    assert np.array_equal(
        functions.linear(x, dense("w", w), b, activation="int8"),
        functions.linear(x, dense("w", w), b),
    )


def test_linear_with_quantised_inputs() -> None:
    x, weight = _array(4, 64), quantize_affine("w", _array(6, 64))
    codes, scale = functions.quantize_activations(x)
    widened = codes.astype(np.float32) * np.repeat(scale, 32, axis=1)
    wanted = torch.tensor(widened) @ torch.tensor(weight.dequantize()).T
    _close(functions.linear(x, weight, activation="int8"), wanted, 1e-5)


@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 70),
    size=st.floats(1e-30, 1e30),
    seed=st.integers(0, 99),
)
def test_quantised_inputs_stay_within_half_a_step(
    rows: int, columns: int, size: float, seed: int
) -> None:
    x = (np.random.default_rng(seed).standard_normal((rows, columns)) * size).astype(np.float32)
    codes, scale = functions.quantize_activations(x)
    padded = -(-columns // 32) * 32
    assert codes.shape == (rows, padded)
    assert scale.shape == (rows, padded // 32)
    assert not codes[:, columns:].any()
    step = np.repeat(scale.astype(np.float64), 32, axis=1)
    error = np.abs(codes * step - np.pad(x, ((0, 0), (0, padded - columns))))
    assert np.all(error <= 0.5001 * step)


def test_quantised_zeros() -> None:
    codes, scale = functions.quantize_activations(np.zeros((2, 32), np.float32))
    assert not codes.any()
    assert not scale.any()


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("run", [24, 8])
def test_rms_norm(run: int, offset: float) -> None:
    x, w = _array(5, 24), _array(run)
    wanted = F.rms_norm(
        torch.tensor(x).reshape(5, -1, run), (run,), torch.tensor(w + np.float32(offset)), 1e-5
    )
    _close(functions.rms_norm(x, w, eps=1e-5, weight_offset=offset), wanted.reshape(5, 24))


@pytest.mark.parametrize("bias", [None, _array(24)])
def test_layer_norm(bias: np.ndarray | None) -> None:
    x, w = _array(5, 24), _array(24)
    given_bias = None if bias is None else torch.tensor(bias)
    wanted = F.layer_norm(torch.tensor(x), (24,), torch.tensor(w), given_bias, 1e-5)
    _close(functions.layer_norm(x, w, bias, eps=1e-5), wanted)


TORCH_ACTIVATIONS: dict[str, Any] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "exp": torch.exp,
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("kind", functions.ACTIVATIONS)
def test_activations(kind: str) -> None:
    x, up = _array(9, 8) * 4, _array(9, 8)
    x[0] = [0, -0.0, 100, -100, 1e-20, -88.8, 30, -30]
    if kind == "exp":
        x = np.minimum(x, 0)
    wanted = TORCH_ACTIVATIONS[kind](torch.tensor(x))
    _close(functions.activation(x, kind=kind), wanted)
    _close(functions.gated_activation(x, up, kind=kind), wanted * torch.tensor(up))


def test_clamped_silu() -> None:
    gate, up = _array(9, 8) * 8, _array(9, 8) * 8
    g, u = torch.tensor(gate).clamp(max=7), torch.tensor(up).clamp(-7, 7)
    wanted = (u + 1) * (g * torch.sigmoid(g * 1.702))
    _close(functions.gated_activation(gate, up, kind="clamped_silu"), wanted)
    assert (np.abs(gate) > 7).any()


def test_l2_norm_of_every_run() -> None:
    x = _array(5, 24)
    wanted = F.normalize(torch.tensor(x).reshape(5, 3, 8), dim=-1).reshape(5, 24)
    _close(functions.l2_norm(x, run=8, eps=0.0), wanted)


def test_split_and_concat_are_each_others_reverse() -> None:
    x = _array(3, 20)
    parts = functions.split(x, widths=(1, 4), runs=4)
    heads = x.reshape(3, 4, 5)
    assert np.array_equal(parts[0], heads[:, :, 0])
    assert np.array_equal(parts[1], heads[:, :, 1:].reshape(3, 16))
    assert np.array_equal(functions.concat(*parts, runs=4), x)


def test_rows_are_replaced_and_the_input_is_not() -> None:
    x, kept, values = _array(4, 3), None, _array(2, 3)
    kept = x.copy()
    out = functions.replace_rows(x, np.array([3, 1], np.int32), values)
    assert np.array_equal(out[[3, 1]], values)
    assert np.array_equal(out[[0, 2]], x[[0, 2]])
    assert np.array_equal(x, kept)


def test_pooling_sees_one_sequence_at_a_time() -> None:
    x, starts = _array(6, 4), np.array([0, 2, 6], np.int32)
    _close(
        functions.pool(x, starts, kind="mean"),
        torch.tensor(np.stack([x[:2].mean(0), x[2:].mean(0)])),
    )
    assert np.array_equal(functions.pool(x, starts, kind="cls"), x[[0, 2]])
    assert np.array_equal(functions.pool(x, starts, kind="last"), x[[1, 5]])


def test_add_and_mul_take_one_row_for_all() -> None:
    x, row = _array(3, 4), _array(4)
    assert np.array_equal(functions.add(x, row), x + row[None])
    assert np.array_equal(functions.mul(x, row), x * row[None])


def test_permuted_weights_meet_the_right_inputs() -> None:
    rng = np.random.default_rng(3)
    plain = quantize_affine(
        "w", rng.standard_normal((6, 64)).astype(np.float32), 4, 32, offset=True
    )
    order = rng.permutation(64).astype(np.int32)
    shuffled = dataclasses.replace(plain, permutation=order)
    x = _array(5, 64)
    assert np.array_equal(shuffled.dequantize()[:, order], plain.dequantize())
    for activation in ("fp32", "int8"):
        found = functions.linear(x, shuffled, activation=activation)
        assert np.array_equal(found, functions.linear(x[:, order], plain, activation=activation))


def test_low_rank() -> None:
    x, down, up = _array(3, 8), _array(2, 8), _array(5, 2)
    _close(functions.low_rank(x, down, up), torch.tensor(x) @ torch.tensor(up @ down).T)


def test_elementwise() -> None:
    x, y = _array(3, 4), _array(3, 4)
    _close(functions.add(x, y), torch.tensor(x) + torch.tensor(y))
    _close(functions.mul(x, y), torch.tensor(x) * torch.tensor(y))
    _close(functions.scale(x, factor=0.3), torch.tensor(x) * 0.3)
    _close(functions.softcap(x, cap=2.0), torch.tanh(torch.tensor(x) / 2) * 2)
    rows = np.array([2, 0, 2], np.int32)
    assert np.array_equal(functions.gather_rows(x, rows), x[[2, 0, 2]])


def _torch_attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, scale: float
) -> torch.Tensor:
    queries, keys, values = (torch.tensor(a).transpose(0, 1)[None] for a in (q, k, v))
    out = F.scaled_dot_product_attention(
        queries, keys, values, torch.tensor(mask), scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 4, 100])
@pytest.mark.parametrize("first", [0, 6])
def test_attend(first: int, window: int, causal: bool) -> None:
    n, heads, kv_heads, dim, value_dim = 5, 6, 2, 8, 4
    length = first + n
    q, k, v = (
        _array(n, heads, dim),
        _array(length, kv_heads, dim),
        _array(length, kv_heads, value_dim),
    )
    query, key = np.arange(first, length)[:, None], np.arange(length)[None]
    mask = (key <= query) if causal else np.ones((n, length), bool)
    if window:
        mask = mask & (np.abs(query - key) < window)
    wanted = _torch_attend(q, k, v, mask, 0.3)
    found = functions.attend(q, k, v, first=first, scale=0.3, window=window, causal=causal)
    _close(found, wanted)


def test_attend_with_softcap_and_sinks() -> None:
    q, k, v, sinks = _array(3, 4, 8), _array(3, 4, 8), _array(3, 4, 8), _array(4) * 3
    scores = torch.einsum("qhd,khd->hqk", torch.tensor(q), torch.tensor(k)) * 0.5
    scores = torch.tanh(scores / 1.5) * 1.5
    scores = scores.masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)
    column = torch.tensor(sinks)[:, None, None].expand(4, 3, 1)
    weights = torch.cat([scores, column], dim=2).softmax(dim=2)[..., :-1]
    wanted = torch.einsum("hqk,khd->qhd", weights, torch.tensor(v))
    _close(functions.attend(q, k, v, first=0, scale=0.5, softcap=1.5, sinks=sinks), wanted)


def test_a_threshold_of_0_keeps_sixteen_bits_everywhere() -> None:
    x = np.random.default_rng(4).standard_normal((5, 70)).astype(np.float32)
    top = np.abs(x).max()
    coarse = np.abs(functions.round_activations(x, 1e9) - x).max()
    fine = np.abs(functions.round_activations(x, 0.0) - x).max()
    assert coarse <= top / 254 * 1.001
    assert fine <= top / 254 / 254  # half a step of 1/256, and the end of the range
    assert fine < coarse / 100


def test_outliers_alone_keep_sixteen_bits() -> None:
    x = np.random.default_rng(4).standard_normal((3, 320)).astype(np.float32)
    x[1, 70] = 400
    error = np.abs(functions.round_activations(x) - x).reshape(3, 10, 32).max(axis=2)
    assert error[1, 2] < 400 / 254 / 200
    others = np.delete(error.reshape(-1), 12)
    plain = np.abs(functions.round_activations(x, 1e9) - x).reshape(3, 10, 32).max(axis=2)
    np.testing.assert_array_equal(others, np.delete(plain.reshape(-1), 12))


def test_no_rows_are_no_error() -> None:
    """A step that only reads a part of a prompt has no row to make an output of."""
    x = np.zeros((0, 64), np.float32)
    assert functions.rms_norm(x, _array(32), eps=1e-5).shape == (0, 64)
    assert functions.layer_norm(x, _array(64), eps=1e-5).shape == (0, 64)
    assert functions.l2_norm(x, run=32, eps=1e-5).shape == (0, 64)
    codes, scales = functions.quantize_activations(x)
    assert (codes.shape, scales.shape) == ((0, 64), (0, 2))
    parts = functions.split(x, widths=(8, 24), runs=2)
    assert [part.shape for part in parts] == [(0, 16), (0, 48)]
    assert functions.concat(*parts, runs=2).shape == (0, 64)
    assert functions.linear(x, dense("w", _array(5, 64))).shape == (0, 5)
