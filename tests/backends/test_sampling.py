"""The native sampler against its numpy meaning, over random parameters."""

from __future__ import annotations

import numpy as np
import pytest

from sartor.backends.base import Backend
from sartor.backends.cpu import _native
from sartor.backends.registry import load_backend
from sartor.graph import SAMPLING_ROW, Batch, Builder, Ragged, StepOutput
from sartor.ops.sampling import uniform
from sartor.ops.weights import Weight, dense
from sartor.plan import ExecutionPlan

ROWS, VOCAB = 240, 3000


class Source:
    def weight(self, name: str) -> Weight:
        rng = np.random.default_rng(3)
        if name == "x.weight":  # one-hot rows times this matrix are the logits, exactly
            return dense(name, np.eye(VOCAB, ROWS, dtype=np.float32))
        logits = rng.standard_normal((VOCAB, ROWS)).astype(np.float32) * 4
        logits[17] = logits[5]  # ties
        return dense(name, logits)

    def identity(self) -> str:
        return "sampling"


def random_rows() -> np.ndarray:
    rng = np.random.default_rng(11)
    rows = np.zeros(ROWS, SAMPLING_ROW)
    rows["temperature"] = rng.choice([0, 0.3, 1, 2.5], ROWS)
    rows["top_k"] = rng.choice([0, 1, 3, 50, VOCAB, VOCAB + 5], ROWS)
    rows["top_p"] = rng.choice([1, 0.999, 0.9, 0.3, 0.0], ROWS)
    rows["min_p"] = rng.choice([0, 0.001, 0.1, 1], ROWS)
    rows["repetition_penalty"] = rng.choice([1, 1.3, 0.8], ROWS)
    rows["presence_penalty"] = rng.choice([0, 0.5, -1], ROWS)
    rows["frequency_penalty"] = rng.choice([0, 0.7], ROWS)
    rows["seed"] = rng.integers(0, 2**63, ROWS, dtype=np.uint64)
    rows["choice"] = rng.integers(0, 4, ROWS)
    rows["position"] = rng.integers(0, 5000, ROWS)
    rows["logprobs"] = rng.choice([-1, 0, 5, 20], ROWS)
    rows["prompt_length"] = 6
    return rows


def run(backend: Backend, rows: np.ndarray, *, histories: bool = True) -> StepOutput:
    rng = np.random.default_rng(5)
    builder = Builder()
    x = builder.embedding(builder.token_ids, "x", VOCAB, ROWS)
    program = builder.finish(
        builder.linear(builder.gather_rows(x, builder.output_rows), "head", VOCAB)
    )
    plan = ExecutionPlan(activation="fp32")
    executable = backend.compile(program, backend.pack(program, Source(), plan, None), plan, "cpu")
    n = len(rows)
    history = [rng.integers(0, VOCAB, rng.integers(0, 30) if histories else 0) for _ in range(n)]
    bias = [np.unique(rng.integers(0, VOCAB, rng.integers(0, 5))) for _ in range(n)]
    batch = Batch(
        tokens=np.arange(n, dtype=np.int32),
        positions=np.zeros(n, np.int32),
        starts=np.arange(n + 1, dtype=np.int32),
        contexts=np.zeros(n, np.int32),
        block_tables=(),
        rope_lengths=np.zeros(n, np.int32),
        output_rows=np.arange(n, dtype=np.int32),
        sampling=rows,
        history=Ragged.of(list(history), np.int32),
        bias_tokens=Ragged.of(list(bias), np.int32),
        bias_values=Ragged.of([rng.standard_normal(len(b)) * 5 for b in bias], np.float32),
    )
    batch.validate()
    return executable.collect(executable.submit(batch))


def test_tokens_and_logprobs_are_the_reference_s() -> None:
    rows = random_rows()
    expected, got = run(load_backend("reference"), rows), run(load_backend("cpu"), rows)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_array_equal(got.top_tokens.starts, expected.top_tokens.starts)
    np.testing.assert_array_equal(got.top_tokens.values, expected.top_tokens.values)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=2e-5)
    np.testing.assert_allclose(got.top_logprobs.values, expected.top_logprobs.values, atol=2e-5)


def test_uniform_is_the_reference_s() -> None:
    for seed, choice, position in ((0, 0, 0), (2**64 - 1, 3, 77), (12345, 2**32 - 1, 2**31)):
        assert _native.uniform(seed, choice, position) == uniform(seed, choice, position)


def test_draws_follow_the_distribution() -> None:
    """4,800 draws of one row against its softmax: a chi-square far below chance of failure."""
    rows = np.zeros(ROWS, SAMPLING_ROW)
    rows["temperature"], rows["top_p"], rows["repetition_penalty"] = 1.0, 1.0, 1.0
    rows["logprobs"] = 20
    counts: dict[int, int] = {}
    output = None
    for position in range(20):
        rows["position"] = position
        rows["seed"] = np.arange(ROWS)
        # Every row looks at token 0's logits, so that they are draws of one distribution.
        output = run_same(rows)
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


_SAME: list[object] = []


def run_same(rows: np.ndarray) -> StepOutput:
    backend = load_backend("cpu")
    builder = Builder()
    x = builder.embedding(builder.token_ids, "x", VOCAB, ROWS)
    program = builder.finish(
        builder.linear(builder.gather_rows(x, builder.output_rows), "head", VOCAB)
    )
    plan = ExecutionPlan(activation="fp32")
    if not _SAME:
        _SAME.append(
            backend.compile(program, backend.pack(program, Source(), plan, None), plan, "cpu")
        )
    executable = _SAME[0]
    none = Ragged(np.zeros(0, np.int32), np.zeros(len(rows) + 1, np.int32))
    batch = Batch(
        tokens=np.zeros(1, np.int32),
        positions=np.zeros(1, np.int32),
        starts=np.array([0, 1], np.int32),
        contexts=np.zeros(1, np.int32),
        block_tables=(),
        rope_lengths=np.zeros(1, np.int32),
        output_rows=np.zeros(len(rows), np.int32),
        sampling=rows,
        history=none,
        bias_tokens=none,
        bias_values=Ragged(np.zeros(0, np.float32), none.starts),
    )
    return executable.collect(executable.submit(batch))  # type: ignore[attr-defined]


@pytest.mark.parametrize("field", ["tokens", "history", "bias"])
def test_ids_outside_the_vocabulary_are_refused(field: str) -> None:
    backend = load_backend("cpu")
    builder = Builder()
    x = builder.embedding(builder.token_ids, "x", VOCAB, ROWS)
    program = builder.finish(
        builder.linear(builder.gather_rows(x, builder.output_rows), "head", VOCAB)
    )
    plan = ExecutionPlan()
    executable = backend.compile(program, backend.pack(program, Source(), plan, None), plan, "cpu")
    one, bad = np.array([0, 1], np.int32), np.array([VOCAB], np.int32)
    empty = Ragged(np.zeros(0, np.int32), np.zeros(2, np.int32))
    batch = Batch(
        tokens=bad if field == "tokens" else np.zeros(1, np.int32),
        positions=np.zeros(1, np.int32),
        starts=one,
        contexts=np.zeros(1, np.int32),
        block_tables=(),
        rope_lengths=np.zeros(1, np.int32),
        output_rows=np.zeros(1, np.int32),
        sampling=np.zeros(1, SAMPLING_ROW),
        history=Ragged(bad, one) if field == "history" else empty,
        bias_tokens=Ragged(bad, one) if field == "bias" else empty,
        bias_values=Ragged(np.ones(1, np.float32), one)
        if field == "bias"
        else Ragged(np.zeros(0, np.float32), empty.starts),
    )
    with pytest.raises(IndexError, match="vocabulary"):
        executable.submit(batch)
