"""Convolution and recurrence against torch and the models' own code in transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from sartor.ops import functions, recurrent

RNG = np.random.default_rng(4)


def _array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def test_short_conv_is_a_causal_convolution() -> None:
    x, weight, bias = _array(9, 6), _array(6, 4), _array(6)
    padded = F.pad(torch.tensor(x.T), (3, 0))
    wanted = F.conv1d(padded[None], torch.tensor(weight)[:, None], torch.tensor(bias), groups=6)
    out, state = recurrent.short_conv(x, weight, bias, np.zeros((3, 6), np.float32))
    np.testing.assert_allclose(out, wanted[0].T.numpy(), atol=1e-5)
    assert np.array_equal(state, x[-3:])


@pytest.mark.parametrize("cut", [1, 2, 3, 8])
def test_short_conv_goes_on_where_it_stopped(cut: int) -> None:
    x, weight = _array(9, 6), _array(6, 4)
    whole, end = recurrent.short_conv(x, weight, None, np.zeros((3, 6), np.float32))
    first, state = recurrent.short_conv(x[:cut], weight, None, np.zeros((3, 6), np.float32))
    second, state = recurrent.short_conv(x[cut:], weight, None, state)
    assert np.array_equal(np.concatenate([first, second]), whole)
    assert np.array_equal(state, end)


def _inputs(n: int, heads: int, key_heads: int) -> list[np.ndarray]:
    q, k = (functions.l2_norm(_array(n, key_heads * 8), run=8, eps=1e-6) for _ in "qk")
    decay = np.exp(-np.abs(_array(n, heads)))
    beta = functions.activation(_array(n, heads), kind="sigmoid")
    return [
        q.reshape(n, key_heads, 8),
        k.reshape(n, key_heads, 8),
        _array(n, heads, 5),
        decay,
        beta,
    ]


def test_the_delta_rule_as_in_transformers() -> None:
    q, k, v, decay, beta = _inputs(7, 4, 2)
    state = _array(4, 8, 5)
    tensors = [torch.tensor(np.repeat(a, 2, axis=1))[None] for a in (q, k)]
    wanted, end = torch_recurrent_gated_delta_rule(
        *tensors,
        torch.tensor(v)[None],
        torch.tensor(np.log(decay))[None],
        torch.tensor(beta)[None],
        initial_state=torch.tensor(state)[None],
        output_final_state=True,
        use_qk_l2norm_in_kernel=False,
    )
    out, after = recurrent.recurrent_scan(q, k, v, decay, beta, state, scale=8**-0.5, delta=True)
    np.testing.assert_allclose(out, wanted[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(after, end[0].numpy(), atol=1e-5)


def test_the_plain_rule_as_in_the_paper_of_mamba_2() -> None:
    """h = decay h + (dt x) B, y = C h, written out for one head at a time."""
    c, b, x, decay, dt = _inputs(6, 2, 1)
    out, after = recurrent.recurrent_scan(
        c, b, x, decay, dt, np.zeros((2, 8, 5), np.float32), scale=1.0, delta=False
    )
    for head in range(2):
        h = np.zeros((8, 5))
        for t in range(6):
            h = decay[t, head] * h + dt[t, head] * np.outer(b[t, 0], x[t, head])
            np.testing.assert_allclose(out[t, head], c[t, 0] @ h, atol=1e-5)
        np.testing.assert_allclose(after[head], h, atol=1e-5)


@pytest.mark.parametrize("delta", [False, True])
def test_the_recurrence_goes_on_where_it_stopped(delta: bool) -> None:
    inputs = _inputs(7, 4, 2)
    state = np.zeros((4, 8, 5), np.float32)
    whole, end = recurrent.recurrent_scan(*inputs, state, scale=0.5, delta=delta)
    parts = []
    for rows in (slice(0, 3), slice(3, 4), slice(4, 7)):
        part, state = recurrent.recurrent_scan(
            *(a[rows] for a in inputs), state, scale=0.5, delta=delta
        )
        parts.append(part)
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(state, end)
