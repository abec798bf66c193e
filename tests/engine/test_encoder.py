"""Vectors of texts: the encoder's step loop, and LLM.embed on a real model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from sartor.engine.encoder import Encoder
from sartor.engine.llm import LLM
from sartor.engine.load import load, make_encoder
from sartor.engine.request import Request
from sartor.errors import CapacityError, UsageError
from sartor.graph import SamplingParams
from sartor.plan import ExecutionPlan

TEXTS = [
    "A cat sleeps on the warm windowsill.",
    "The kitten naps in the sun.",
    "Quarterly revenue rose by ten percent, mostly abroad.",
    "OK",
    " ".join(["Rain fell on the roof all night long, and nobody minded."] * 12),
]


@pytest.fixture(scope="module")
def encoder(minilm: Path) -> Encoder:
    return make_encoder(load(minilm, ExecutionPlan(max_sequences=3), "minilm", None))


def request(name: str, *tokens: int, priority: int = 0) -> Request:
    return Request(name, tokens or (101, 2000, 102), SamplingParams(), 0, priority=priority)


def test_real_vectors_equal_those_of_transformers(minilm: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    oracle = transformers.AutoModel.from_pretrained(minilm).eval()
    with LLM(minilm) as llm:
        found = llm.embed(TEXTS)
        alone = np.concatenate([llm.embed(text) for text in TEXTS])
    assert found.dtype == np.float32
    assert np.array_equal(found, alone), "company must change no bit on the CPU"
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            states = oracle(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        wanted = states.mean(dim=0).numpy()
        cosine = vector @ wanted / np.linalg.norm(wanted) / np.linalg.norm(vector)
        assert cosine >= 0.9999
    assert found[0] @ found[1] > found[0] @ found[2]


def test_the_model_writes_no_text_and_a_writer_makes_no_vectors(
    minilm: Path, model_files: dict[str, Path]
) -> None:
    with LLM(minilm) as llm:
        with pytest.raises(UsageError, match=r"makes vectors of texts and writes none.*embed"):
            llm.generate("hello")
        with pytest.raises(UsageError, match="writes none"):
            llm.stream("hello")
        with pytest.raises(CapacityError, match="reads at most 256"):
            llm.embed("word " * 300)
        assert llm.embed([]).shape == (0, 0)
        assert llm.embed([[101, 2000, 102]]).shape == (1, 384)
    with (
        LLM(model_files["smollm2-135m"], max_context=64) as llm,
        pytest.raises(UsageError, match="writes text and makes no vectors"),
    ):
        llm.embed("hello")


def test_steps_take_requests_by_priority_and_arrival(encoder: Encoder) -> None:
    for name, priority in (("a", 0), ("b", 0), ("c", 1), ("d", 0)):
        encoder.add(request(name, priority=priority))
    assert (encoder.waiting, encoder.has_work) == (4, True)
    first = encoder.step()
    assert [chunk.request_id for chunk in first] == ["c", "a", "b"]  # three a step
    assert all(len(chunk.embedding) == 4 * 384 for chunk in first)
    assert {chunk.finish_reason for chunk in first} == {"stop"}
    assert [chunk.request_id for chunk in encoder.step()] == ["d"]
    assert encoder.step() == []
    assert not encoder.has_work


def test_an_aborted_request_ends_once(encoder: Encoder) -> None:
    encoder.add(request("gone"))
    encoder.abort("gone")
    encoder.abort("gone")
    (chunk,) = encoder.step()
    assert (chunk.request_id, chunk.finish_reason, chunk.embedding) == ("gone", "abort", b"")
    assert not encoder.has_work


def test_a_step_that_fails_ends_its_requests_and_no_others(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder.add(request("bad"))
    with monkeypatch.context() as patch:
        patch.setattr(encoder.executable, "submit", lambda batch: 1 / 0)
        (chunk,) = encoder.step()
    assert chunk.finish_reason == "error"
    assert chunk.error == "ZeroDivisionError: division by zero"
    encoder.add(request("good"))
    (chunk,) = encoder.step()
    assert chunk.finish_reason == "stop"


def test_what_cannot_be_encoded_is_refused(encoder: Encoder) -> None:
    encoder.add(request("a"))
    with pytest.raises(UsageError, match="the id is in use"):
        encoder.add(request("a"))
    with pytest.raises(UsageError, match="token id 99999"):
        encoder.add(request("b", 101, 99999))
    with pytest.raises(UsageError, match="one vector of plain text"):
        encoder.add(Request("c", (101,), SamplingParams(n=2), 0))
    encoder.reset()
    assert [chunk.finish_reason for chunk in encoder.step()] == ["abort"]
