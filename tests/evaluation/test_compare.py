"""The mathematics of comparison, against closed forms and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sartor.errors import UsageError
from sartor.evaluation import Comparison, compare
from sartor.evaluation.compare import (
    kl_divergence,
    log_softmax,
    negative_log_likelihood,
    perplexity,
)


def rows(*probabilities: list[float]) -> np.ndarray:
    return np.log(np.array(probabilities))


def random_logits(seed: int) -> np.ndarray:
    return (8 * np.random.default_rng(seed).standard_normal((7, 101))).astype(np.float32)


def test_log_softmax_equals_torch_and_ignores_shifts() -> None:
    logits = random_logits(0)
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()
    assert np.allclose(log_softmax(logits), expected, rtol=0, atol=1e-13)
    assert np.allclose(log_softmax(logits.astype(np.float64) + 1e4), expected, rtol=0, atol=1e-9)
    assert log_softmax(logits).dtype == np.float64


def test_log_softmax_leaves_its_input_alone() -> None:
    logits = random_logits(1).astype(np.float64)
    before = logits.copy()
    log_softmax(logits)
    assert np.array_equal(logits, before)


def test_kl_of_two_coins() -> None:
    p, q = 0.9, 0.6
    expected = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    found = kl_divergence(rows([p, 1 - p]), rows([q, 1 - q]))
    assert found == pytest.approx([expected])
    # The reference comes first: the other direction is another number.
    assert kl_divergence(rows([q, 1 - q]), rows([p, 1 - p])) != pytest.approx([expected])


def test_kl_equals_torch() -> None:
    reference, found = log_softmax(random_logits(2)), log_softmax(random_logits(3))
    expected = torch.nn.functional.kl_div(
        torch.tensor(found), torch.tensor(reference), log_target=True, reduction="none"
    ).sum(-1)
    assert np.allclose(kl_divergence(reference, found), expected.numpy(), rtol=1e-12)


def test_kl_where_the_reference_has_no_mass() -> None:
    with np.errstate(divide="ignore"):
        reference = rows([1.0, 0.0])
    assert kl_divergence(reference, rows([0.5, 0.5])) == pytest.approx([np.log(2)])


def test_perplexity_of_a_uniform_model_is_the_vocabulary() -> None:
    nll = negative_log_likelihood(log_softmax(np.zeros((5, 37), np.float32)), [0, 9, 36, 1, 1])
    assert perplexity(nll) == pytest.approx(37)


def test_perplexity_equals_torch() -> None:
    logits, targets = random_logits(4), [3, 1, 4, 1, 5, 9, 2]
    loss = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(targets))
    found = perplexity(negative_log_likelihood(log_softmax(logits), targets))
    assert found == pytest.approx(float(loss.exp()), rel=1e-5)


def test_comparison_of_equal_and_of_different_logits() -> None:
    logits = random_logits(5)
    same = compare(logits, logits)
    assert same.mean_kl == same.max_kl == 0
    assert same.top_1_agreement == 1
    changed = logits.copy()
    changed[2, changed[2].argmin()] = 100
    found = compare(logits, changed)
    assert found.top_1_agreement == pytest.approx(6 / 7)
    assert found.max_kl == found.kl[2] > 10
    assert found.mean_kl == pytest.approx(found.kl[2] / 7)


def test_join_keeps_every_position() -> None:
    first, second = random_logits(6), random_logits(7)
    parts = [compare(first[:3], second[:3]), compare(first[3:], second[3:])]
    whole = compare(first, second)
    assert np.array_equal(Comparison.join(parts).kl, whole.kl)
    assert np.array_equal(Comparison.join(parts).agreed, whole.agreed)


def test_other_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match="one vocabulary"):
        compare(np.zeros((2, 5), np.float32), np.zeros((2, 6), np.float32))
