"""A program whose logits are rows of a random matrix, and random parameters to sample them with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sartor.backends.base import Executable
from sartor.backends.registry import load_backend
from sartor.graph import SAMPLING_ROW, Batch, Builder, Ragged, StepOutput
from sartor.ops.weights import Weight, dense
from sartor.plan import ExecutionPlan

ROWS, VOCAB = 240, 1500
LOGPROBS = (-1, 0, 5, 20)  # none, else how many alternatives


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


def random_rows(seed: int = 11, logprobs: Sequence[int] = LOGPROBS) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = np.zeros(ROWS, SAMPLING_ROW)
    rows["temperature"] = rng.choice([0, 0.3, 1, 2.5], ROWS)
    rows["top_k"] = rng.choice([0, 1, 3, 50, VOCAB, VOCAB + 5], ROWS)
    rows["top_p"] = rng.choice([1, 0.999, 0.9, 0.3, 0.0], ROWS)
    rows["min_p"] = rng.choice([0, 0.001, 0.1, 1], ROWS)
    rows["repetition_penalty"] = rng.choice([1, 1.3, 0.8], ROWS)
    rows["presence_penalty"] = rng.choice([0, 0.5, -1], ROWS)
    rows["frequency_penalty"] = rng.choice([0, 0.7], ROWS)
    rows["seed"] = rng.integers(0, 2**64, ROWS, dtype=np.uint64)
    rows["choice"] = rng.integers(0, 4, ROWS)
    rows["position"] = rng.integers(0, 5000, ROWS)
    rows["logprobs"] = rng.choice(logprobs, ROWS)
    rows["prompt_length"] = 6
    return rows


def batch_of(rows: np.ndarray, *, histories: bool = True, biases: bool = True) -> Batch:
    """A sequence a row: its token is the row of logits."""
    rng = np.random.default_rng(5)
    n = len(rows)
    history = [rng.integers(0, VOCAB, rng.integers(0, 30) if histories else 0) for _ in range(n)]
    bias = [np.unique(rng.integers(0, VOCAB, rng.integers(0, 5 * biases + 1))) for _ in range(n)]
    return Batch(
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


def with_ids_outside(field: str) -> Batch:
    """A batch one of whose fields names tokens that the vocabulary does not have."""
    batch = batch_of(random_rows())
    given = getattr(batch, field)
    if field == "tokens":
        bad: object = np.full_like(given, VOCAB)
    else:
        bad = Ragged(np.full_like(given.values, VOCAB), given.starts)
    return dataclasses.replace(batch, **{field: bad})


def compiled(backend: str, device: str, threads: int = 1) -> Executable:
    builder = Builder()
    x = builder.embedding(builder.token_ids, "x", VOCAB, ROWS)
    program = builder.finish(
        builder.linear(builder.gather_rows(x, builder.output_rows), "head", VOCAB)
    )
    plan = ExecutionPlan(activation="fp32", device=device, threads=threads)
    chip = load_backend(backend)
    executable = chip.compile(program, chip.pack(program, Source(), plan, None), plan, device)
    executable.allocate_state([])
    return executable


def run(backend: str, device: str, batch: Batch, threads: int = 1) -> StepOutput:
    executable = compiled(backend, device, threads)
    return executable.collect(executable.submit(batch))


def assert_equal_outputs(got: StepOutput, expected: StepOutput) -> None:
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_array_equal(got.top_tokens.starts, expected.top_tokens.starts)
    np.testing.assert_array_equal(got.top_tokens.values, expected.top_tokens.values)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=2e-5)
    np.testing.assert_allclose(got.top_logprobs.values, expected.top_logprobs.values, atol=2e-5)
