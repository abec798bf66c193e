"""The native sampler against its numpy meaning, over random parameters."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sampling_runner import (
    ROWS,
    assert_equal_outputs,
    batch_of,
    compiled,
    random_rows,
    run,
    with_ids_outside,
)

from sartor.backends.cpu import _native
from sartor.graph import SAMPLING_ROW
from sartor.ops.sampling import uniform

THREADS = 2


def test_tokens_and_logprobs_are_the_reference_s() -> None:
    batch = batch_of(random_rows())
    expected, got = run("reference", "reference", batch), run("cpu", "cpu", batch, THREADS)
    assert_equal_outputs(got, expected)


def test_uniform_is_the_reference_s() -> None:
    for seed, choice, position in ((0, 0, 0), (2**64 - 1, 3, 77), (12345, 2**32 - 1, 2**31)):
        assert _native.uniform(seed, choice, position) == uniform(seed, choice, position)


def test_draws_follow_the_distribution() -> None:
    """4,800 draws of one row against its softmax: a chi-square far below chance of failure."""
    rows = np.zeros(ROWS, SAMPLING_ROW)
    rows["temperature"], rows["top_p"], rows["repetition_penalty"] = 1.0, 1.0, 1.0
    rows["logprobs"] = 20
    rows["seed"] = np.arange(ROWS)
    # Every row looks at token 0's logits, so that they are draws of one distribution.
    same = np.zeros(ROWS, np.int32)
    executable = compiled("cpu", "cpu", THREADS)
    counts: dict[int, int] = {}
    output = None
    for position in range(20):
        rows["position"] = position
        batch = batch_of(rows, histories=False, biases=False)
        batch = dataclasses.replace(batch, output_rows=same)
        output = executable.collect(executable.submit(batch))
        for token in output.tokens:
            counts[int(token)] = counts.get(int(token), 0) + 1
    assert output is not None
    first = slice(output.top_tokens.starts[0], output.top_tokens.starts[1])
    total = 20 * ROWS
    for token, logprob in zip(
        output.top_tokens.values[first][:5], output.top_logprobs.values[first][:5], strict=True
    ):
        expected = total * float(np.exp(logprob))
        assert abs(counts.get(int(token), 0) - expected) < 5 * np.sqrt(expected) + 1


@pytest.mark.parametrize("field", ["tokens", "history", "bias_tokens"])
def test_ids_outside_the_vocabulary_are_refused(field: str) -> None:
    executable = compiled("cpu", "cpu", THREADS)
    with pytest.raises(IndexError, match="vocabulary"):
        executable.submit(with_ids_outside(field))
