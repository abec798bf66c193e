"""Layers with a state of fixed size: short convolution and linear recurrence, step by step.

Both take the tokens of one sequence and the state that the tokens before them left, and return
the state after the last. A sequence begins with a state of zeros.
"""

from __future__ import annotations

import numpy as np

from sartor.ops.weights import F32


def short_conv(x: F32, weight: F32, bias: F32 | None, state: F32) -> tuple[F32, F32]:
    """Causal convolution of every feature by itself.

    ``x [n, C]``, ``weight [C, width]`` (the last column is for the current token), ``state
    [width - 1, C]``: the inputs before the first token, oldest first.
    """
    width = weight.shape[1]
    history = np.concatenate([state, x])
    out = np.zeros_like(x)
    for tap in range(width):
        out += history[tap : tap + len(x)] * weight[:, tap]
    return (out if bias is None else out + bias), history[len(x) :].copy()


def recurrent_scan(
    q: F32, k: F32, v: F32, decay: F32, beta: F32, state: F32, *, scale: float, delta: bool
) -> tuple[F32, F32]:
    """A linear recurrence whose state is a matrix a head, ``state [heads, key_dim, value_dim]``.

    For each token: ``S = decay * S``; ``S += k (x) u``; ``out = scale * q S``, where ``u`` is
    ``beta * v`` (Mamba-2, arXiv:2405.21060: k = B, q = C, beta = dt), or with ``delta``
    ``beta * (v - k S)``: the part of v that the decayed state does not give back for k already
    (gated delta rule, arXiv:2412.06464).

    ``q, k [n, key_heads, key_dim]``, ``v [n, heads, value_dim]``, ``decay, beta [n, heads]``;
    value heads share key heads in equal groups.
    """
    group = v.shape[1] // k.shape[1]
    q, k = np.repeat(q, group, axis=1), np.repeat(k, group, axis=1)
    state = state.copy()
    out = np.zeros_like(v)
    for t in range(len(v)):
        state *= decay[t][:, None, None]
        known = np.einsum("hk,hkv->hv", k[t], state) if delta else np.float32(0)
        update = beta[t][:, None] * (v[t] - known)
        state += k[t][:, :, None] * update[:, None, :]
        out[t] = np.einsum("hk,hkv->hv", q[t], state) * np.float32(scale)
    return out, state
