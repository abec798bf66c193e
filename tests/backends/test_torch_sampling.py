"""Torch's sampler against its numpy meaning, over random parameters."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sartor.backends.registry import load_backend  # noqa: E402
from sartor.backends.torch.sampling import lay_out_sampling, uniform  # noqa: E402
from sartor.errors import UsageError  # noqa: E402
from sartor.graph import SAMPLING_ROW, Batch, Builder, Ragged, StepOutput  # noqa: E402
from sartor.ops.sampling import uniform as reference_uniform  # noqa: E402
from sartor.ops.weights import Weight, dense  # noqa: E402
from sartor.plan import ExecutionPlan  # noqa: E402

ROWS, VOCAB = 240, 1500
DEVICES = [device.name for device in load_backend("torch").devices()]


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


def random_rows(seed: int = 11) -> np.ndarray:
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
    rows["logprobs"] = rng.choice([-1, 0, 5, 20, VOCAB + 9], ROWS)
    rows["prompt_length"] = 6
    return rows


def batch_of(rows: np.ndarray, *, histories: bool, biases: bool) -> Batch:
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


def run(backend: str, device: str, batch: Batch) -> StepOutput:
    builder = Builder()
    x = builder.embedding(builder.token_ids, "x", VOCAB, ROWS)
    program = builder.finish(
        builder.linear(builder.gather_rows(x, builder.output_rows), "head", VOCAB)
    )
    plan = ExecutionPlan(activation="fp32", device=device, threads=1)
    chip = load_backend(backend)
    executable = chip.compile(program, chip.pack(program, Source(), plan, None), plan, device)
    executable.allocate_state([])
    return executable.collect(executable.submit(batch))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("histories", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_tokens_and_logprobs_are_the_reference_s(
    device: str, histories: bool, biases: bool
) -> None:
    batch = batch_of(random_rows(), histories=histories, biases=biases)
    expected, got = run("reference", "reference", batch), run("torch", device, batch)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_array_equal(got.top_tokens.starts, expected.top_tokens.starts)
    np.testing.assert_array_equal(got.top_tokens.values, expected.top_tokens.values)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=2e-5)
    np.testing.assert_allclose(got.top_logprobs.values, expected.top_logprobs.values, atol=2e-5)


@pytest.mark.parametrize("kind", ["greedy", "uncut", "cut"])
def test_steps_that_need_less_work_give_the_same(kind: str) -> None:
    rows = random_rows(12)
    rows["logprobs"] = -1
    if kind == "greedy":
        rows["temperature"] = 0
    if kind != "cut":
        rows["top_k"], rows["top_p"], rows["min_p"] = 0, 1, 0
    batch = batch_of(rows, histories=False, biases=False)
    shape, _ = lay_out_sampling(batch)
    assert (shape.draws, shape.cuts, shape.plain) == (kind != "greedy", kind == "cut", True)
    expected, got = run("reference", "reference", batch), run("torch", "torch-cpu", batch)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    assert not got.logprobs.any()
    assert not len(got.top_tokens.values)


def test_no_rows_give_no_tokens() -> None:
    batch = batch_of(random_rows()[:3], histories=True, biases=True)
    none = batch_of(random_rows()[:0], histories=True, biases=True)
    batch = dataclasses.replace(
        batch,
        output_rows=none.output_rows,
        sampling=none.sampling,
        history=none.history,
        bias_tokens=none.bias_tokens,
        bias_values=none.bias_values,
    )
    output = run("torch", "torch-cpu", batch)
    assert len(output.tokens) == len(output.logprobs) == 0
    assert output.top_tokens.starts.tolist() == [0]


def test_uniform_is_the_reference_s() -> None:
    rng = np.random.default_rng(2)
    seeds = [0, 2**64 - 1, 12345, *rng.integers(0, 2**64, 50, dtype=np.uint64).tolist()]
    for choice, position in ((0, 0), (3, 77), (2**32 - 1, 2**31 - 1)):
        counter = np.array([choice << 32 | position], np.uint64).view(np.int64)
        drawn = uniform(
            torch.from_numpy(np.array(seeds, np.uint64).view(np.int64)), torch.from_numpy(counter)
        )
        assert drawn.tolist() == [reference_uniform(seed, choice, position) for seed in seeds]


@pytest.mark.parametrize("field", ["tokens", "history", "bias_tokens"])
def test_ids_outside_the_vocabulary_are_refused(field: str) -> None:
    batch = batch_of(random_rows(), histories=True, biases=True)
    given = getattr(batch, field)
    if field == "tokens":
        bad: object = np.full_like(given, VOCAB)
    else:
        bad = Ragged(np.full_like(given.values, VOCAB), given.starts)
    with pytest.raises(UsageError, match="vocabulary"):
        run("torch", "torch-cpu", dataclasses.replace(batch, **{field: bad}))
