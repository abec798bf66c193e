"""The native sampler against its numpy meaning, over random parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_runner import (
    LOGPROBS,
    ROWS,
    VOCAB,
    assert_equal_outputs,
    batch_of,
    compiled,
    random_rows,
    run,
    with_ids_outside,
)

from sartor.backends.cpu import _native
from sartor.backends.reference.sample import sample
from sartor.graph import SAMPLING_ROW, Batch, Ragged, StepOutput
from sartor.ops.sampling import uniform

THREADS = 2
PATHS = _native.usable_paths()
F32 = npt.NDArray[np.float32]

# One vocabulary shorter than a block of the sampler, some around its ends, some of many blocks.
VOCABULARIES = (1, 2, 17, 255, 256, 257, 1000, 5003, 40_000)
SHAPES = ("normal", "narrow", "flat", "wide", "tied", "equal", "peaked", "masked", "far")


def logits_of(shape: str, rows: int, vocab: int, rng: np.random.Generator) -> F32:
    """Rows ``[rows, vocab]`` of one kind, of which each has its difficulty."""
    x = rng.standard_normal((rows, vocab))
    spread = {"narrow": 1e-3, "wide": 30.0, "far": 5.0, "masked": 3.0, "peaked": 3.0}
    x *= spread.get(shape, 2.0)
    if shape == "flat":
        x = rng.random((rows, vocab))
    elif shape == "tied":
        x = np.round(x * 2) / 2 * rng.choice([-1, 1], x.shape)  # -0 too
    elif shape == "equal":
        x[:] = rng.standard_normal((rows, 1))
    elif shape == "peaked":
        x[np.arange(rows), rng.integers(0, vocab, rows)] += 40
    elif shape == "masked":
        keep = rng.random(x.shape) < 0.02
        keep[:, rng.integers(0, vocab)] = True
        x = np.where(keep, x, -np.inf)
    elif shape == "far":
        x += 1e4
    return x.astype(np.float32)


def random_batch(rows: int, vocab: int, rng: np.random.Generator) -> Batch:
    """Parameters, histories and biases of rows whose logits come from elsewhere."""
    sampling = np.zeros(rows, SAMPLING_ROW)
    sampling["temperature"] = rng.choice([0, 0.01, 0.3, 1, 2.5, 100], rows)
    sampling["top_k"] = rng.choice([0, 0, 1, 3, 50, 700, vocab, vocab + 5], rows)
    sampling["top_p"] = rng.choice([1, 1, 0.999, 0.95, 0.3, 0.0], rows)
    sampling["min_p"] = rng.choice([0, 0, 1e-5, 0.001, 0.1, 1], rows)
    sampling["repetition_penalty"] = rng.choice([1, 1.3, 0.8], rows)
    sampling["presence_penalty"] = rng.choice([0, 0.5, -1], rows)
    sampling["frequency_penalty"] = rng.choice([0, 0.7], rows)
    sampling["seed"] = rng.integers(0, 2**64, rows, dtype=np.uint64)
    sampling["choice"] = rng.integers(0, 4, rows)
    sampling["position"] = rng.integers(0, 5000, rows)
    sampling["logprobs"] = -1
    sampling["prompt_length"] = rng.choice([0, 6, 300], rows)
    history = [rng.integers(0, vocab, rng.choice([0, 0, 20, 400])) for _ in range(rows)]
    biases = [rng.integers(0, vocab, rng.choice([0, 0, 5])) for _ in range(rows)]
    return dataclasses.replace(
        batch_of(sampling),
        history=Ragged.of(list(history), np.int32),
        bias_tokens=Ragged.of(list(biases), np.int32),  # the same token twice, sometimes
        bias_values=Ragged.of([rng.standard_normal(len(b)) * 5 for b in biases], np.float32),
    )


def run_native(path: str, logits: F32, batch: Batch) -> StepOutput:
    """What the native sampler makes of ``logits``, which it must leave as they are."""
    written = logits.copy()
    (tokens, logprobs, ids, values, starts), seconds = _native.Sampler(path).run(
        written,
        batch.sampling.view(np.uint8).reshape(-1),
        batch.history.values,
        batch.history.starts,
        batch.bias_tokens.values,
        batch.bias_tokens.starts,
        batch.bias_values.values,
    )
    np.testing.assert_array_equal(written.view(np.int32), logits.view(np.int32))
    assert seconds.shape == (len(logits),)
    assert np.all(seconds >= 0)
    return StepOutput(tokens, logprobs, Ragged(ids, starts), Ragged(values, starts))


@settings(max_examples=60)
@given(
    st.sampled_from(SHAPES),
    st.sampled_from(VOCABULARIES),
    st.integers(0, 2**32 - 1),
)
def test_every_path_chooses_the_token_that_is_meant(shape: str, vocab: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = 24 if vocab < 10_000 else 6
    logits, batch = logits_of(shape, rows, vocab, rng), random_batch(rows, vocab, rng)
    expected = sample(logits, batch).tokens
    for path in PATHS:
        np.testing.assert_array_equal(run_native(path, logits, batch).tokens, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wanted", [0, 1, 20, 100, 700, 10_000])
def test_alternatives_are_in_order_and_ties_by_id(shape: str, wanted: int) -> None:
    rng = np.random.default_rng(wanted)
    logits, batch = logits_of(shape, 3, 5003, rng), random_batch(3, 5003, rng)
    batch.sampling["logprobs"] = wanted
    outputs = [run_native(path, logits, batch) for path in PATHS]
    for output in outputs:
        for row, token, logprob, ids, values in zip(
            logits,
            output.tokens,
            output.logprobs,
            np.split(output.top_tokens.values, output.top_tokens.starts[1:-1]),
            np.split(output.top_logprobs.values, output.top_logprobs.starts[1:-1]),
            strict=True,
        ):
            below = row - row.max()
            every = below - np.float32(np.log(np.exp(below.astype(np.float64)).sum()))
            order = np.lexsort((np.arange(len(every)), -every))[:wanted]
            np.testing.assert_array_equal(ids, order)
            np.testing.assert_allclose(values, every[order], atol=1e-12)
            np.testing.assert_allclose(logprob, every[token], atol=1e-12)


def one_row(logits: Sequence[float], **fields: float) -> tuple[int, int]:
    """Token and likeliest alternative of one row."""
    sampling = np.zeros(1, SAMPLING_ROW)
    sampling["top_p"], sampling["repetition_penalty"], sampling["logprobs"] = 1, 1, 1
    for name, value in fields.items():
        sampling[name] = value
    batch = batch_of(sampling, histories=False, biases=False)
    outputs = [run_native(path, np.asarray([logits], np.float32), batch) for path in PATHS]
    found = {(int(out.tokens[0]), int(out.top_tokens.values[0])) for out in outputs}
    assert len(found) == 1
    return found.pop()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_finite_top_give_the_lowest_of_the_largest(temperature: float) -> None:
    inf = float("inf")
    for filters in ({}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}):
        given_ = {"temperature": temperature, **filters}
        assert one_row([-inf] * 300, **given_)[0] == 0
        assert one_row([0.0, 1.0, inf, 2.0, inf], **given_)[0] == 2


def test_the_ends_of_the_filters_are_kept() -> None:
    # Four equal tokens: min-p 1 keeps all, top-p 1/2 two, top-k 3 three.
    for filters, kept in (({"min_p": 1}, 4), ({"top_p": 0.5}, 2), ({"top_k": 3}, 3)):
        drawn = {
            one_row([-80.0, 7.0, 7.0, -90.0, 7.0, 7.0], temperature=1, position=i, **filters)[0]
            for i in range(100)
        }
        assert drawn == set([1, 2, 4, 5][:kept])


def test_tokens_and_logprobs_are_the_reference_s() -> None:
    batch = batch_of(random_rows(logprobs=(*LOGPROBS, VOCAB + 9)))
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
