"""What hybrid architectures share: layers with a linear recurrence in place of attention.

Mamba-2: arXiv:2405.21060. Gated delta rule: arXiv:2412.06464.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sartor.errors import FormatError
from sartor.graph import Builder, Value
from sartor.models.config import LayerConfig
from sartor.models.options import Options
from sartor.models.registry import TensorPlace
from sartor.ops.weights import Weight, dense

_TYPES: Mapping[str, bool] = {
    "linear_attention": True,
    "mamba": True,
    "full_attention": False,
    "attention": False,
}


@dataclass(frozen=True, kw_only=True)
class HybridLayer(LayerConfig):
    """``recurrent``: a linear recurrence stands in place of attention."""

    recurrent: bool


def recurrent_layers(options: Options, keys: tuple[str, ...], layers: int) -> tuple[bool, ...]:
    """Which layers are recurrent, from the first of the lists that is there; () if none is."""
    for key in keys:
        types = options.texts(key)
        if types is None:
            continue
        unknown = sorted(set(types) - set(_TYPES))
        if unknown or len(types) != layers:
            raise options.refusal(key, unknown or f"{len(types)} entries")
        return tuple(_TYPES[kind] for kind in types)
    return ()


def step_size(b: Builder, x: Value, heads: int) -> Value:
    """``softplus(x + dt_bias)``, from and to ``[T, heads]``."""
    x = b.add(x, b.vector("dt_bias", heads, "heads"), "dt_sum")
    return b.activation(x, "softplus", "dt")


def decay(b: Builder, step: Value, heads: int) -> Value:
    """``exp(-exp(A_log) * step)``: what a step leaves of the state, ``[T, heads]``.

    The weight ``A_log`` is ``-exp(A_log)`` by the time it is read: :func:`locate_recurrent`.
    """
    rate = b.mul(step, b.vector("A_log", heads, "heads"), "rate")
    return b.activation(rate, "exp", "decay")


def locate_recurrent(name: str, channels: int, taps: int) -> TensorPlace | None:
    """The convolution ``[channels, 1, taps]`` and ``A_log`` of a layer; None for the rest."""
    if name.endswith(".conv1d.weight"):
        return TensorPlace(name, shape=(channels, 1, taps), convert=_without_middle)
    if name.endswith(".A_log"):
        return TensorPlace(name, convert=_rates)
    return None


def _without_middle(weight: Weight) -> Weight:
    return dataclasses.replace(weight, data=weight.data[:, 0])


def _rates(weight: Weight) -> Weight:
    values = weight.dequantize()
    if not np.isfinite(values).all():
        raise FormatError(f"weight {weight.name}: not all of it is finite; fetch it again")
    return dense(weight.name, -np.exp(values))
