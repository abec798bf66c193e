"""The chip's kernels: operators in float64. Begin here, one operator after another.

A kernel takes the step, the numbers of its inputs and the node's attributes, and returns its
result, or a tuple where it has none or several. ``step.chip(value)`` is an input in the chip's
memory, ``step.x(value)`` the same on the host. Meanings: ``sartor/ops/functions.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from sartor_example_chip.step import ExampleStep

F64 = npt.NDArray[np.float64]
Inputs = tuple[int, ...]


def embedding(step: ExampleStep, inputs: Inputs, *, scale: float) -> F64:
    return step.chip(inputs[1])[step.x(inputs[0])] * scale


def linear(step: ExampleStep, inputs: Inputs) -> F64:
    x = step.chip(inputs[0])
    out = x @ step.chip(inputs[1]).T
    if len(inputs) > 2:
        out += step.chip(inputs[2])
    for rows, layer in step.adapted(inputs[1], step.outputs[0]):
        out[rows] += x[rows] @ layer.down.T @ layer.up.T
    return out


def _normed(x: F64, weight: F64, eps: float, weight_offset: float) -> F64:
    runs = x.reshape(len(x), -1, len(weight))  # a weight shorter than a row: heads by themselves
    normed = runs / np.sqrt((runs * runs).mean(axis=2, keepdims=True) + eps)
    return (normed * (weight + weight_offset)).reshape(x.shape)


def rms_norm(step: ExampleStep, inputs: Inputs, *, eps: float, weight_offset: float) -> F64:
    return _normed(step.chip(inputs[0]), step.chip(inputs[1]), eps, weight_offset)


def add_rms_norm(
    step: ExampleStep, inputs: Inputs, *, eps: float, weight_offset: float
) -> tuple[F64, F64]:
    """Fused: the sum goes on to the next layer, and its norm into this one."""
    total = step.chip(inputs[0]) + step.chip(inputs[1])
    return total, _normed(total, step.chip(inputs[2]), eps, weight_offset)


def add(step: ExampleStep, inputs: Inputs) -> F64:
    return step.chip(inputs[0]) + step.chip(inputs[1])


def attention(
    step: ExampleStep,
    inputs: Inputs,
    *,
    state: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    scale: float,
    window: int,
    softcap: float,
) -> F64:
    """Over the pages of the state, sequence by sequence; query heads share key heads in groups."""
    group = heads // kv_heads
    q = step.chip(inputs[0]).reshape(-1, kv_heads, group, head_dim).transpose(1, 2, 0, 3)
    sinks = step.chip(inputs[1]).reshape(kv_heads, group, 1, 1) if len(inputs) > 1 else None
    out = np.empty((q.shape[2], heads * value_dim))
    for s, rows in step.sequences():
        first = int(step.batch.contexts[s])  # position of the first query
        end = first + rows.stop - rows.start
        low = max(0, first - window + 1) if window else 0
        pages = step.executable.state.read(step.batch, state, s, low, end)
        k, v = (page.astype(np.float64).transpose(1, 0, 2)[:, None] for page in pages)
        scores = q[:, :, rows] @ k.swapaxes(-1, -2) * scale  # [kv_heads, group, queries, keys]
        if softcap:
            scores = np.tanh(scores / softcap) * softcap
        age = np.arange(first, end)[:, None] - np.arange(low, end)
        scores[..., (age < 0) | ((age >= window) if window else False)] = -np.inf
        top = scores.max(axis=-1, keepdims=True)
        if sinks is not None:  # logits that take part in the softmax and carry no value
            top = np.maximum(top, sinks)
        weights = np.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        if sinks is not None:
            total += np.exp(sinks - top)
        out[rows] = (weights / total @ v).transpose(2, 0, 1, 3).reshape(end - first, -1)
    return out


KERNELS: Mapping[str, Callable[..., Any]] = {
    kernel.__name__: kernel
    for kernel in (embedding, linear, rms_norm, add_rms_norm, add, attention)
}
"""Operators that run on the chip; numpy runs the others on the host."""
