"""Sampling parameters and batches: what is out of range, or does not fit together, is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from sartor.engine.request import Request
from sartor.errors import UsageError
from sartor.graph import (
    SAMPLING_ROW,
    Batch,
    Ragged,
    SamplingDefaults,
    SamplingParams,
    describe_sampling,
)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": True},
        {"temperature": 10**400},
        {"top_k": 7.5},
        {"max_tokens": 2.5},
        {"top_p": 1.1},
        {"min_p": -1},
        {"top_k": -1},
        {"repetition_penalty": 0},
        {"n": 0},
        {"logprobs": 21},
        {"max_tokens": 0},
        {"seed": 2**64},
        {"stop": ("",)},
        {"stop": ("x",) * 17},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: 101.0}},
    ],
)
def test_parameters_out_of_range_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(fields))):
        SamplingParams(**fields)


def test_row_of_parameters() -> None:
    assert SAMPLING_ROW.itemsize == 56
    params = SamplingParams(temperature=0.5, top_k=7, top_p=0.25, logprobs=2, presence_penalty=1)
    row = params.row(seed=-1, choice=3, prompt_length=9)[0]
    assert row["temperature"] == 0.5
    assert (row["top_k"], row["choice"], row["prompt_length"]) == (7, 3, 9)
    assert (row["seed"], row["logprobs"], row["position"]) == (2**64 - 1, 2, 0)
    assert SamplingParams().row(seed=0, choice=0, prompt_length=0)[0]["logprobs"] == -1
    assert params.needs_history
    assert not SamplingParams().needs_history


def test_what_is_left_open_is_of_the_first_layer_that_says_it() -> None:
    preset = SamplingDefaults(temperature=0.2, origin="preset x")
    own = SamplingDefaults(temperature=0.9, top_k=20, origin="file")
    asked = SamplingParams(top_p=0.5, seed=7)
    found = asked.resolved(preset, own)
    assert (found.temperature, found.top_p, found.top_k) == (0.2, 0.5, 20)
    assert (found.min_p, found.repetition_penalty, found.seed) == (0.0, 1.0, 7)
    assert found.resolved(own) is found
    assert (SamplingParams().resolved().temperature, SamplingParams().resolved().top_p) == (
        0.7,
        0.95,
    )
    # 0 and 1 are values, not absence.
    plain = SamplingParams(temperature=0, top_k=0, top_p=1).resolved(own)
    assert (plain.temperature, plain.top_k, plain.top_p) == (0, 0, 1)
    row = SamplingParams(temperature=1).row(seed=0, choice=0, prompt_length=0)[0]
    assert (row["temperature"], row["top_k"]) == (1, 0)
    assert row["top_p"] == np.float32(0.95)


def test_sampling_is_told_in_one_line() -> None:
    assert describe_sampling() == "temperature 0.7, top-p 0.95 (default)"
    own = SamplingDefaults(temperature=0.6, repetition_penalty=1.1, origin="file")
    assert describe_sampling(own) == (
        "temperature 0.6, repetition penalty 1.1 (file); top-p 0.95 (default)"
    )


def test_a_request_has_no_open_values() -> None:
    params = Request("a", (1,), SamplingParams(min_p=0.1), seed=1).params
    assert (params.temperature, params.top_p, params.min_p) == (0.7, 0.95, 0.1)


COPY = np.array([[0, 1], [0, 2]], np.int32)


def _batch(**changes: Any) -> Batch:
    empty = Ragged.of([np.zeros(0, np.int32)], np.int32)
    batch = Batch(
        tokens=np.array([1, 2, 3], np.int32),
        positions=np.array([0, 1, 5], np.int32),
        starts=np.array([0, 2, 3], np.int32),
        contexts=np.array([0, 5], np.int32),
        block_tables=(np.zeros((2, 1), np.int32),),
        rope_lengths=np.array([8, 8], np.int32),
        output_rows=np.array([2], np.int32),
        sampling=SamplingParams().row(seed=0, choice=0, prompt_length=0),
        history=empty,
        bias_tokens=empty,
        bias_values=empty,
    )
    return dataclasses.replace(batch, **changes)


def test_batch_that_fits() -> None:
    _batch().validate()
    _batch(copies=(COPY,)).validate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"starts": np.array([0, 2, 4], np.int32)}, "starts"),
        ({"starts": np.array([0, 0, 3], np.int32)}, "without tokens"),
        ({"positions": np.zeros(2, np.int32)}, "positions has 2 entries instead of 3"),
        ({"contexts": np.zeros(1, np.int32)}, "contexts"),
        ({"rope_lengths": np.zeros(1, np.int32)}, "rope_lengths"),
        ({"output_rows": np.array([3], np.int32)}, "output row"),
        ({"output_rows": np.array([-1], np.int32)}, "output row"),
        ({"output_rows": np.array([0, 1], np.int32)}, "sampling"),
        ({"block_tables": (np.zeros(2, np.int32),)}, "block table"),
        ({"copies": (COPY, COPY)}, "copies for 2 of 1 state groups"),
        ({"copies": (np.zeros(2, np.int32),)}, "copies of shape"),
        ({"copies": (-COPY,)}, "copy of no block"),
        ({"copies": (np.array([[0, 2], [1, 2]], np.int32),)}, "copies into one block"),
        ({"copies": (np.array([[0, 1], [1, 2]], np.int32),)}, "of one that is written"),
    ],
)
def test_batch_that_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _batch(**changes).validate()


def test_ragged() -> None:
    ragged = Ragged.of([np.array([1, 2]), np.zeros(0), np.array([3])], np.int32)
    assert ragged.values.dtype == np.int32
    assert ragged.values.tolist() == [1, 2, 3]
    assert ragged.starts.tolist() == [0, 2, 2, 3]
    assert len(Ragged.of([], np.float32).values) == 0
