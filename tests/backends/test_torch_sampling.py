"""Torch's sampler against its numpy meaning, over random parameters."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sampling_runner import (
    LOGPROBS,
    VOCAB,
    assert_equal_outputs,
    batch_of,
    random_rows,
    run,
    with_ids_outside,
)

torch = pytest.importorskip("torch")

from sartor.backends.registry import load_backend  # noqa: E402
from sartor.backends.torch.sampling import lay_out_sampling, uniform  # noqa: E402
from sartor.errors import UsageError  # noqa: E402
from sartor.ops.sampling import uniform as reference_uniform  # noqa: E402

DEVICES = [device.name for device in load_backend("torch").devices()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("histories", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_tokens_and_logprobs_are_the_reference_s(
    device: str, histories: bool, biases: bool
) -> None:
    rows = random_rows(logprobs=(*LOGPROBS, VOCAB + 9))
    batch = batch_of(rows, histories=histories, biases=biases)
    expected, got = run("reference", "reference", batch), run("torch", device, batch)
    assert_equal_outputs(got, expected)


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
    batch = batch_of(random_rows()[:3])
    none = batch_of(random_rows()[:0])
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
    batch = with_ids_outside(field)
    with pytest.raises(UsageError, match="vocabulary"):
        run("torch", "torch-cpu", batch)
