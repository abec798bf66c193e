"""Sampling: penalties and filters against transformers, draws against their distribution."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sartor.ops.sampling import SampleRow, adjust, log_softmax, mix64, sample_row, uniform

LOGITS = np.random.default_rng(5).standard_normal(40).astype(np.float32) * 2
DRAWS = 4000


def _drawn(row: SampleRow, draws: int = DRAWS) -> np.ndarray:
    tokens = [sample_row(LOGITS, dataclasses.replace(row, position=i)) for i in range(draws)]
    return np.bincount(tokens, minlength=len(LOGITS))


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    logits = np.array([0, 3, 1, 3], np.float32)
    assert sample_row(logits, SampleRow()) == 1
    assert sample_row(logits, SampleRow(top_k=2, top_p=0.1, min_p=0.5)) == 1


def test_one_candidate_is_greedy() -> None:
    for row in (
        SampleRow(temperature=1, top_k=1),
        SampleRow(temperature=1, top_p=0.0),
        SampleRow(temperature=1, min_p=1.0),
        SampleRow(temperature=1e-3),
    ):
        assert _drawn(row, 50).argmax() == LOGITS.argmax()
        assert _drawn(row, 50).max() == 50


@pytest.mark.parametrize(
    ("row", "warper"),
    [
        (SampleRow(temperature=1, top_k=5), TopKLogitsWarper(5)),
        (SampleRow(temperature=1, top_p=0.7), TopPLogitsWarper(0.7)),
        (SampleRow(temperature=1, min_p=0.2), MinPLogitsWarper(0.2)),
        (SampleRow(temperature=1), None),
        (SampleRow(temperature=2.0, top_k=12), TopKLogitsWarper(12)),
    ],
)
def test_draws_follow_the_filtered_distribution(row: SampleRow, warper: object) -> None:
    scores = torch.tensor(LOGITS)[None] / row.temperature
    if warper is not None:
        scores = warper(None, scores)  # type: ignore[operator]
    wanted = scores.softmax(dim=-1)[0].numpy().astype(np.float64)
    counts = _drawn(row)
    assert not counts[wanted == 0].any()
    deviation = np.sqrt(DRAWS * wanted * (1 - wanted))
    assert np.all(np.abs(counts - DRAWS * wanted) <= 4.5 * deviation + 1)


def test_repetition_penalty() -> None:
    history = (3, 3, 9, 20)
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    wanted = processor(torch.tensor([history]), torch.tensor(LOGITS)[None])[0].numpy()
    found = adjust(LOGITS, SampleRow(repetition_penalty=1.7, history=history, prompt_length=2))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_presence_and_frequency_count_the_output_only() -> None:
    row = SampleRow(
        presence_penalty=0.5, frequency_penalty=0.25, history=(1, 2, 2, 7, 2), prompt_length=2
    )
    difference = LOGITS - adjust(LOGITS, row)
    wanted = np.zeros(len(LOGITS))
    wanted[2], wanted[7] = 0.5 + 2 * 0.25, 0.5 + 0.25
    np.testing.assert_allclose(difference, wanted, atol=1e-6)


def test_bias_adds_to_logits() -> None:
    row = SampleRow(bias=((4, 100.0), (5, -100.0)))
    assert sample_row(LOGITS, row) == 4
    assert adjust(LOGITS, row)[5] == pytest.approx(LOGITS[5] - 100)


def test_adjust_leaves_its_input_alone() -> None:
    before = LOGITS.copy()
    adjust(LOGITS, SampleRow(history=(1, 2), repetition_penalty=2, bias=((3, 1.0),)))
    assert np.array_equal(LOGITS, before)


def test_equal_arguments_draw_equal_numbers() -> None:
    """Golden values: every backend must draw these numbers."""
    assert mix64(0) == 0xE220A8397B1DCDAF  # first output of splitmix64 seeded with 0
    assert uniform(1, 2, 3) == uniform(1, 2, 3)
    assert len({uniform(1, 0, 0), uniform(2, 0, 0), uniform(1, 1, 0), uniform(1, 0, 1)}) == 4
    assert uniform(-1, 0, 0) == uniform(2**64 - 1, 0, 0)


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**31 - 1))
def test_numbers_lie_in_the_unit_interval(seed: int, choice: int, position: int) -> None:
    assert 0 <= uniform(seed, choice, position) < 1


def test_numbers_are_even() -> None:
    numbers = np.array([uniform(11, 0, i) for i in range(8000)])
    counts, _ = np.histogram(numbers, bins=16, range=(0, 1))
    assert np.all(np.abs(counts - 500) < 4.5 * np.sqrt(500))
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.05


def test_log_softmax() -> None:
    wanted = torch.tensor(LOGITS).log_softmax(dim=-1).numpy()
    np.testing.assert_allclose(log_softmax(LOGITS), wanted, atol=2e-6)
    assert log_softmax(LOGITS + np.float32(1e4)).dtype == np.float32
