"""Routing and grouped linears against what the models' own code in transformers does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from sartor.ops import dense, experts, functions, quantize_affine

RNG = np.random.default_rng(2)


def _array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def test_softmax_routing_keeps_the_best_and_normalises() -> None:
    logits = _array(9, 8)
    chosen, weights = experts.route_experts(
        logits, top_k=3, score="softmax", normalize=True, scale=1.0
    )
    best = torch.topk(torch.tensor(logits), 3)
    assert np.array_equal(chosen, best.indices.numpy())
    np.testing.assert_allclose(weights, best.values.softmax(dim=1).numpy(), rtol=1e-6)


def test_equal_scores_go_to_the_lower_number() -> None:
    chosen, _ = experts.route_experts(
        np.zeros((2, 6), np.float32), top_k=3, score="sigmoid", normalize=False, scale=1.0
    )
    assert chosen.tolist() == [[0, 1, 2]] * 2


def test_groups_by_their_best_expert_as_in_deepseek_v2() -> None:
    router = DeepseekV2TopkRouter(
        _router(n_group=4, topk_group=2, topk_method="group_limited_greedy", scale=2.5)
    )
    router.weight.data = torch.eye(12)
    logits = _array(40, 12)
    _, weight, index = router(torch.tensor(logits))
    chosen, weights = experts.route_experts(
        logits,
        top_k=3,
        score="softmax",
        normalize=False,
        scale=2.5,
        groups=4,
        top_groups=2,
        group_score="max",
    )
    _same_choice(chosen, weights, index, weight)


def test_groups_by_their_best_two_and_a_bias_as_in_deepseek_v3() -> None:
    router = DeepseekV3TopkRouter(_router(n_group=3, topk_group=2, scale=1.5))
    router.weight.data = torch.eye(12)
    bias, logits = _array(12), _array(40, 12)
    router.e_score_correction_bias.copy_(torch.tensor(bias))
    _, weight, index = router(torch.tensor(logits))
    chosen, weights = experts.route_experts(
        logits,
        bias,
        top_k=3,
        score="sigmoid",
        normalize=True,
        scale=1.5,
        groups=3,
        top_groups=2,
        group_score="top2_sum",
    )
    _same_choice(chosen, weights, index, weight)


def _router(scale: float, **options: Any) -> SimpleNamespace:
    """A configuration whose router gives its input as the logits."""
    return SimpleNamespace(
        hidden_size=12,
        num_experts=12,
        num_local_experts=12,
        n_routed_experts=12,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        routed_scaling_factor=scale,
        **options,
    )


def _same_choice(
    chosen: np.ndarray, weights: np.ndarray, index: torch.Tensor, weight: torch.Tensor
) -> None:
    """The order of the chosen does not matter: their results are added."""
    for row in range(len(chosen)):
        found = dict(zip(chosen[row].tolist(), weights[row].tolist(), strict=True))
        wanted = dict(zip(index[row].tolist(), weight[row].tolist(), strict=True))
        assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("apart", [False, True])
def test_grouped_linear_is_a_linear_for_each_choice(apart: bool) -> None:
    weight, bias = _array(5, 6, 8), _array(5, 6)
    chosen = RNG.integers(0, 5, (7, 2)).astype(np.int32)
    x = _array(7, 16 if apart else 8)
    out = experts.grouped_linear(x, chosen, dense("w", weight), bias).reshape(7, 2, 6)
    for t in range(7):
        for slot in range(2):
            row = x[t, 8 * slot : 8 * slot + 8] if apart else x[t]
            expert = chosen[t, slot]
            np.testing.assert_allclose(
                out[t, slot], weight[expert] @ row + bias[expert], rtol=1e-4, atol=1e-5
            )


def test_grouped_linear_rounds_each_row_as_a_linear_does() -> None:
    values = _array(3, 4, 64)
    flat = quantize_affine("w", values.reshape(12, 64), 4, 32, offset=True)
    x, chosen = _array(5, 64), np.array([[2], [0], [1], [1], [2]], np.int32)
    out = experts.grouped_linear(x, chosen, flat.reshape(3, 4), activation="int8")
    for t, expert in enumerate(chosen[:, 0]):
        one = flat.reshape(3, 4).rows(int(expert))
        wanted = functions.linear(x[t : t + 1], one, activation="int8")
        np.testing.assert_allclose(out[t : t + 1], wanted, rtol=1e-5, atol=1e-5)


def test_head_linear_is_a_block_diagonal() -> None:
    weight, x = _array(3, 4, 8), _array(5, 24)
    wanted = np.einsum("hnk,thk->thn", weight, x.reshape(5, 3, 8)).reshape(5, 12)
    np.testing.assert_allclose(experts.head_linear(x, dense("w", weight)), wanted, atol=1e-5)


def test_combine_experts() -> None:
    x, weights = _array(4, 15), _array(4, 3)
    wanted = np.einsum("tkn,tk->tn", x.reshape(4, 3, 5), weights)
    np.testing.assert_allclose(experts.combine_experts(x, weights), wanted, atol=1e-5)
