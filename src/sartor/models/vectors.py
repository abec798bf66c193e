"""From the tokens of a text to its vector: what encoders share behind their last layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from sartor.formats import Checkpoint
from sartor.graph import Builder, Value
from sartor.models.config import VectorConfig, VectorStep

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

_LENGTH_EPS = 1e-24  # what torch's normalize bounds the length by, squared
_NORM_EPS = 1e-5  # that of torch.nn.LayerNorm


def text_vectors(b: Builder, x: Value, config: VectorConfig) -> Value:
    """One vector ``[S, width]`` for each text, from tokens ``[T, hidden]``."""
    x = _weighted(b, x, config) if config.weighted else _pooled(b, x, config)
    for index, step in enumerate(config.steps):
        with b.scope(step.name or f"step{index}"):
            x = _STEPS[step.kind](b, x, step)
    return x


def include_weights(checkpoint: Checkpoint, config: VectorConfig) -> None:
    """Makes the weights of the steps tensors of the checkpoint: each has a folder of its own."""
    from sartor.formats.safetensors import SafetensorsCheckpoint

    assert isinstance(checkpoint, SafetensorsCheckpoint)
    for step in config.steps:
        if step.name:
            checkpoint.include(step.name)


def _pooled(b: Builder, x: Value, config: VectorConfig) -> Value:
    parts = [b.pool(x, kind, f"pool{i or ''}") for i, kind in enumerate(config.poolings)]
    return parts[0] if len(parts) == 1 else b.concat(parts, "pooled")


def _weighted(b: Builder, x: Value, config: VectorConfig) -> Value:
    """Means of tokens times weights that the batch gives: :func:`token_weights`."""
    count = len(config.poolings)
    weights = b.token_numbers(x, count)
    columns = [weights] if count == 1 else b.split(weights, [1] * count, "weights_split")
    parts = []
    for index, column in enumerate(columns):
        rows = b.combine_experts(x, column, f"weighted{index}")
        parts.append(b.pool(rows, "mean", f"pool{index}"))
    return parts[0] if count == 1 else b.concat(parts, "pooled")


def token_weights(config: VectorConfig, tokens: int, left_out: int) -> F32:
    """``[tokens, poolings]``: weights whose mean over the tokens of a text is its pooling, where
    the first ``left_out`` tokens (a prompt) take no part."""
    return np.stack(
        [tokens * _WEIGHTS[kind](tokens, left_out) for kind in config.poolings], axis=1
    ).astype(np.float32)


def _from(tokens: int, first: int) -> F64:
    kept: F64 = (np.arange(tokens) >= first).astype(np.float64)
    return kept


def _one(tokens: int, index: int) -> F64:
    kept: F64 = (np.arange(tokens) == index).astype(np.float64)
    return kept


def _equal(tokens: int, first: int, power: float) -> F64:
    weights: F64 = _from(tokens, first) / (tokens - first) ** power
    return weights


def _by_place(tokens: int, first: int) -> F64:
    """A token counts as often as its position in the whole text, counted from one."""
    places = np.arange(1.0, tokens + 1) * _from(tokens, first)
    weights: F64 = places / places.sum()
    return weights


_WEIGHTS: Mapping[str, Callable[[int, int], F64]] = {
    "mean": lambda tokens, first: _equal(tokens, first, 1),
    "mean_sqrt_length": lambda tokens, first: _equal(tokens, first, 0.5),
    "weighted_mean": _by_place,
    "cls": _one,
    "last": lambda tokens, first: _one(tokens, tokens - 1),
}


# Steps --------------------------------------------------------------------------------


def _dense(b: Builder, x: Value, step: VectorStep) -> Value:
    out = b.linear(x, "linear", step.width, bias=step.bias)
    if step.activation == "tanh":
        out = b.softcap(out, 1.0, "activation")  # tanh(x / 1) * 1
    elif step.activation:
        out = b.activation(out, step.activation)
    if step.residual:
        same = x.shape[1] == step.width
        out = b.add(out, x if same else b.linear(x, "residual", step.width), "sum")
    return out


def _layer_norm(b: Builder, x: Value, step: VectorStep) -> Value:
    return b.layer_norm(x, "norm", eps=_NORM_EPS)


def _normalize(b: Builder, x: Value, step: VectorStep) -> Value:
    return b.l2_norm(x, step.width, _LENGTH_EPS, "normalize")


_STEPS: Mapping[str, Callable[[Builder, Value, VectorStep], Value]] = {
    "dense": _dense,
    "layer_norm": _layer_norm,
    "normalize": _normalize,
}
