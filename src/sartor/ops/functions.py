"""What each operator means, in numpy: the reference that every backend is held to.

Written to be read, not to be fast. Activations are float32 ``[tokens, features]``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from sartor.ops.weights import F32, AffineFormat, LookupFormat, Weight

I32 = npt.NDArray[np.int32]
POOLS = ("mean", "cls", "last")
ACTIVATION_GROUP = 32
"""Features that share one scale when activations are quantised to int8."""

OUTLIER = 2.5
"""Scales above this many times their row's root mean square keep 16 bits; chosen by measuring
agreement with float32 against time (docs/architecture.md)."""


GATE_ALPHA = 1.702
GATE_LIMIT = 7.0
"""The constants of :func:`clamped_silu` (GPT-OSS)."""


def embedding(ids: I32, table: Weight, *, scale: float = 1.0) -> F32:
    """Rows of the table, times ``scale`` (Gemma multiplies by sqrt(hidden))."""
    rows = table.rows(ids.astype(np.int64)).dequantize()
    return rows * np.float32(scale)


def quantize_activations(x: F32) -> tuple[npt.NDArray[np.int8], F32]:
    """Dynamic int8: ``x = codes * scale`` by groups of 32 features, rounding half to even.

    Codes ``[T, K]``, scales ``[T, K / 32]``. K is padded with zeros to a whole group.
    """
    rows, columns = x.shape
    padded = -(-columns // ACTIVATION_GROUP) * ACTIVATION_GROUP
    x = np.pad(x, ((0, 0), (0, padded - columns)))
    grouped = x.reshape(rows, padded // ACTIVATION_GROUP, ACTIVATION_GROUP)
    scale = np.abs(grouped).max(axis=2) / np.float32(127)
    inverse = np.where(scale > 0, np.float32(1) / np.where(scale > 0, scale, 1), np.float32(0))
    codes = np.rint(grouped * inverse[:, :, None]).astype(np.int8)
    return codes.reshape(rows, padded), scale.astype(np.float32)


def round_activations(x: F32, threshold: float = OUTLIER) -> F32:
    """What a linear layer with int8 activations sees of its input.

    Where a group's scale is above ``threshold`` times the root mean square of its row's scales,
    what the codes left over is quantised again with 1/256 of the scale: such groups hold
    outliers, are few, and would make most of the error. A threshold of 0 refines all.
    """
    codes, scale = quantize_activations(x)
    used = -(-x.shape[1] // ACTIVATION_GROUP)
    square = np.sum(scale * scale, axis=1, keepdims=True, dtype=np.float32) / np.float32(used)
    refined = (scale > np.float32(threshold) * np.sqrt(square)) & (scale > 0)
    fine = np.where(refined, scale / np.float32(256), np.float32(0))
    wide, fine = (np.repeat(s, ACTIVATION_GROUP, axis=1) for s in (scale, fine))
    seen = codes * wide
    left = np.pad(x, ((0, 0), (0, seen.shape[1] - x.shape[1]))) - seen
    inverse = np.where(fine > 0, np.float32(1) / np.where(fine > 0, fine, 1), np.float32(0))
    seen = seen + np.rint(left * inverse).clip(-127, 127) * fine
    kept: F32 = seen[:, : x.shape[1]].astype(np.float32)
    return kept


def linear(
    x: F32,
    weight: Weight,
    bias: F32 | None = None,
    *,
    activation: str = "fp32",
    threshold: float = OUTLIER,
) -> F32:
    """``x @ weight.T + bias``; with ``activation="int8"`` the inputs are quantised first.

    Quantised inputs apply to integer codes only; weights in floats always see float32.
    """
    if weight.permutation is not None:
        x, weight = x[:, weight.permutation], dataclasses.replace(weight, permutation=None)
    if activation == "int8" and rounds_activations(weight):
        x = round_activations(x, threshold)
    out: F32 = x @ weight.dequantize().T
    return out if bias is None else out + bias


def rounds_activations(weight: Weight) -> bool:
    """Whether the plan's activation format applies: to integer codes, not to floats."""
    return isinstance(weight.format, AffineFormat | LookupFormat)


def low_rank(x: F32, down: F32, up: F32) -> F32:
    """What an adapter adds to a linear layer: ``(x @ down.T) @ up.T``, in float32 on the input
    as it is (LoRA, arXiv:2106.09685). ``down [r, K]``, ``up [N, r]``, its scale folded in."""
    return ((x @ down.T) @ up.T).astype(np.float32, copy=False)


def rms_norm(x: F32, weight: F32, *, eps: float, weight_offset: float = 0.0) -> F32:
    """Root-mean-square norm over runs of ``len(weight)`` features (arXiv:1910.07467).

    A weight shorter than a row normalises each head by itself (q/k norm). Gemma stores
    ``weight - 1``: ``weight_offset`` is added.
    """
    grouped = x.reshape(x.shape[0], x.shape[1] // weight.shape[0], weight.shape[0])
    mean = np.mean(grouped * grouped, axis=2, keepdims=True, dtype=np.float32)
    normed = grouped / np.sqrt(mean + np.float32(eps))
    out: F32 = normed * (weight + np.float32(weight_offset))
    return out.reshape(x.shape)


def layer_norm(x: F32, weight: F32, bias: F32 | None = None, *, eps: float) -> F32:
    """Mean and variance norm over a row (arXiv:1607.06450)."""
    mean = x.mean(axis=1, keepdims=True, dtype=np.float32)
    centred = x - mean
    variance = np.mean(centred * centred, axis=1, keepdims=True, dtype=np.float32)
    out: F32 = centred / np.sqrt(variance + np.float32(eps)) * weight
    return out if bias is None else out + bias


def l2_norm(x: F32, *, run: int, eps: float) -> F32:
    """Each run of ``run`` features over the square root of its squares' sum plus ``eps``."""
    grouped = x.reshape(x.shape[0], x.shape[1] // run, run)
    total = np.sum(grouped * grouped, axis=2, keepdims=True, dtype=np.float32)
    out = (grouped / np.sqrt(total + np.float32(eps))).astype(np.float32, copy=False)
    return out.reshape(x.shape)


def _silu(x: F32) -> F32:
    return (x / (np.float32(1) + np.exp(-x))).astype(np.float32, copy=False)


def _gelu_tanh(x: F32) -> F32:
    inner = np.float32(0.7978845608028654) * (x + np.float32(0.044715) * x * x * x)
    out = np.float32(0.5) * x * (np.float32(1) + np.tanh(inner))
    return out.astype(np.float32, copy=False)


def _gelu(x: F32) -> F32:
    return np.float32(0.5) * x * (np.float32(1) + _erf(x * np.float32(0.7071067811865476)))


def _erf(x: F32) -> F32:
    """Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7."""
    t = 1 / (1 + 0.3275911 * np.abs(x.astype(np.float64)))
    poly = t * (
        0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    )
    return (np.sign(x) * (1 - poly * np.exp(-(x.astype(np.float64) ** 2)))).astype(np.float32)


def _relu(x: F32) -> F32:
    return np.maximum(x, np.float32(0))


def _sigmoid(x: F32) -> F32:
    return (np.float32(1) / (np.float32(1) + np.exp(-x))).astype(np.float32, copy=False)


def _softplus(x: F32) -> F32:
    out: F32 = np.maximum(x, np.float32(0)) + np.log1p(np.exp(-np.abs(x)))
    return out


ACTIVATIONS: dict[str, Callable[[F32], F32]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "sigmoid": _sigmoid,
    "softplus": _softplus,
    "exp": np.exp,
    "tanh": np.tanh,
}
GATED_ACTIVATIONS: tuple[str, ...] = (*ACTIVATIONS, "clamped_silu")


def activation(x: F32, *, kind: str) -> F32:
    """An elementwise activation; ``kind`` is a key of :data:`ACTIVATIONS`."""
    with np.errstate(over="ignore"):
        return ACTIVATIONS[kind](x)


def gated_activation(gate: F32, up: F32, *, kind: str) -> F32:
    """``activation(gate) * up`` (GLU variants, arXiv:2002.05202), or :func:`clamped_silu`."""
    return clamped_silu(gate, up) if kind == "clamped_silu" else activation(gate, kind=kind) * up


def clamped_silu(gate: F32, up: F32) -> F32:
    """``gate * sigmoid(1.702 gate) * (up + 1)``: the gate clamped to at most 7, ``up`` to 7 both
    ways (GPT-OSS, arXiv:2508.10925)."""
    gate = np.minimum(gate, np.float32(GATE_LIMIT))
    up = np.clip(up, np.float32(-GATE_LIMIT), np.float32(GATE_LIMIT))
    return gate * activation(np.float32(GATE_ALPHA) * gate, kind="sigmoid") * (up + np.float32(1))


def add(x: F32, y: F32) -> F32:
    """``y`` has the shape of ``x``, or is one row for all of them."""
    return x + y


def mul(x: F32, y: F32) -> F32:
    """``y`` has the shape of ``x``, or is one row for all of them."""
    return x * y


def split(x: F32, *, widths: Sequence[int], runs: int) -> tuple[F32, ...]:
    """Cuts each of ``runs`` equal runs of a row (heads) into parts of these widths; each result
    holds one part of every run."""
    grouped = x.reshape(len(x), runs, x.shape[1] // runs)
    ends = np.cumsum(widths)
    return tuple(
        np.ascontiguousarray(grouped[:, :, end - width : end]).reshape(len(x), runs * width)
        for width, end in zip(widths, ends, strict=True)
    )


def concat(*parts: F32, runs: int) -> F32:
    """The reverse of :func:`split`."""
    rows, columns = len(parts[0]), sum(part.shape[1] for part in parts)
    grouped = [part.reshape(rows, runs, part.shape[1] // runs) for part in parts]
    return np.concatenate(grouped, axis=2).reshape(rows, columns)


def replace_rows(x: F32, rows: I32, values: F32) -> F32:
    """``x`` with some rows given: token embeddings that an encoder of images made, say."""
    out = x.copy()
    out[rows] = values
    return out


def pool(x: F32, starts: I32, *, kind: str) -> F32:
    """One row a sequence, from its tokens ``[starts[s], starts[s + 1])``: their mean, the first
    ("cls") or the last."""
    if kind == "mean":
        lengths = np.diff(starts).astype(np.float32)[:, None]
        total: F32 = np.add.reduceat(x, starts[:-1], axis=0, dtype=np.float32)
        return (total / lengths).astype(np.float32, copy=False)
    return x[starts[:-1]] if kind == "cls" else x[starts[1:] - 1]


def scale(x: F32, *, factor: float) -> F32:
    return x * np.float32(factor)


def softcap(x: F32, *, cap: float) -> F32:
    """``cap * tanh(x / cap)``: squashes logits softly (Gemma 2)."""
    out: F32 = np.tanh(x / np.float32(cap)) * np.float32(cap)
    return out


def gather_rows(x: F32, rows: I32) -> F32:
    return x[rows]


def attend(
    q: F32,
    k: F32,
    v: F32,
    *,
    first: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
    sinks: F32 | None = None,
) -> F32:
    """Attention of one sequence: ``q [n, heads, dim]`` over ``k, v [length, kv_heads, dim]``.

    Query i stands at position ``first + i``. A query sees positions up to its own (causal) or
    all of them, and only those nearer than ``window`` where ``window > 0``. Query heads share
    key-value heads in equal groups (arXiv:2305.13245). ``sinks [heads]`` are logits that take
    part in the softmax and carry no value.
    """
    n, heads, _ = q.shape
    length, kv_heads, _ = k.shape
    group = heads // kv_heads
    keys = np.repeat(k, group, axis=1)
    values = np.repeat(v, group, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, keys) * np.float32(scale)
    if softcap:
        scores = np.tanh(scores / np.float32(softcap)) * np.float32(softcap)
    query_at = first + np.arange(n)[:, None]
    key_at = np.arange(length)[None, :]
    visible = key_at <= query_at if causal else np.ones((n, length), bool)
    if window:
        visible &= np.abs(key_at - query_at) < window
    scores = np.where(visible[None], scores, np.float32(-np.inf))
    top = scores.max(axis=2, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, sinks[:, None, None])
    weights = np.exp(scores - top)
    total = weights.sum(axis=2, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[:, None, None] - top)
    out: F32 = np.einsum("hqk,khd->qhd", weights / total, values).astype(np.float32)
    return out
