"""Mixture of experts: choosing them, their linear layers, and the weighted sum of their results.

A token has k *slots*, one an expert that it was sent to. What belongs to the slots of a token
stands side by side in its row: ``[T, k * features]``.
"""

from __future__ import annotations

import numpy as np

from sartor.ops.functions import I32, OUTLIER, linear
from sartor.ops.weights import F32, Weight

SCORES = ("softmax", "sigmoid")
GROUP_SCORES = ("max", "top2_sum")


def route_experts(
    logits: F32,
    bias: F32 | None = None,
    *,
    top_k: int,
    score: str,
    normalize: bool,
    scale: float,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
) -> tuple[I32, F32]:
    """The experts of each token ``[T, k]`` and their weights ``[T, k]``, best first.

    ``logits [T, experts]`` become scores by softmax or sigmoid. ``bias [experts]`` counts for the
    choice only (DeepSeek-V3, arXiv:2412.19437). With several ``groups`` of neighbouring experts
    only those of the ``top_groups`` best are eligible; a group is as good as its best expert, or
    as the sum of its best two (DeepSeek-V2, arXiv:2405.04434; V3). Weights are the chosen
    scores, divided by their sum where ``normalize`` is set, times ``scale``. Of equal scores the
    expert with the lower number is chosen.
    """
    if score == "softmax":
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores = shifted / shifted.sum(axis=1, keepdims=True, dtype=np.float32)
    else:
        scores = np.float32(1) / (np.float32(1) + np.exp(-logits))
    choice = scores if bias is None else scores + bias
    if groups > 1:
        grouped = choice.reshape(len(logits), groups, -1)
        if group_score == "max":
            merit = grouped.max(axis=2)
        else:
            merit = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2, dtype=np.float32)
        best = np.argsort(-merit, axis=1, kind="stable")[:, :top_groups]
        eligible = np.zeros(merit.shape, bool)
        np.put_along_axis(eligible, best, True, axis=1)
        choice = np.where(eligible[:, :, None], grouped, -np.inf).reshape(choice.shape)
    experts = np.argsort(-choice, axis=1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(scores, experts, axis=1)
    if normalize:
        weights = weights / weights.sum(axis=1, keepdims=True, dtype=np.float32)
    return experts.astype(np.int32), (weights * np.float32(scale)).astype(np.float32)


def grouped_linear(
    x: F32,
    experts: I32,
    weight: Weight,
    bias: F32 | None = None,
    *,
    activation: str = "fp32",
    threshold: float = OUTLIER,
) -> F32:
    """Slot j of token t goes through the matrix of ``experts[t, j]``.

    ``x`` is ``[T, K]``, one row for all slots, or ``[T, k * K]``, a part for each;
    ``weight [experts, N, K]``, ``bias [experts, N]``; the result is ``[T, k * N]``.
    """
    tokens, slots = experts.shape
    n, k = weight.shape[1:]
    rows = x.reshape(-1, k) if x.shape[1] != k or slots == 1 else np.repeat(x, slots, axis=0)
    chosen = experts.reshape(-1)
    out = np.empty((tokens * slots, n), np.float32)
    for expert in np.unique(chosen):
        mine = chosen == expert
        out[mine] = linear(
            rows[mine],
            weight.rows(int(expert)),
            None if bias is None else bias[expert],
            activation=activation,
            threshold=threshold,
        )
    return out.reshape(tokens, slots * n)


def head_linear(
    x: F32, weight: Weight, *, activation: str = "fp32", threshold: float = OUTLIER
) -> F32:
    """A matrix a head: ``x [T, heads * K]``, ``weight [heads, N, K]``; gives ``[T, heads * N]``."""
    heads = weight.shape[0]
    experts = np.tile(np.arange(heads, dtype=np.int32), (len(x), 1))
    return grouped_linear(x, experts, weight, activation=activation, threshold=threshold)


def combine_experts(x: F32, weights: F32) -> F32:
    """The weighted sum over the slots: ``x [T, k * N]``, ``weights [T, k]``, result ``[T, N]``."""
    slots = weights.shape[1]
    out = np.zeros((len(x), x.shape[1] // slots), np.float32)
    for slot, part in enumerate(np.split(x, slots, axis=1)):
        out = out + part * weights[:, slot : slot + 1]
    return out
