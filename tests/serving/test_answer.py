"""Decisions inside gateway and worker, without processes."""

from __future__ import annotations

import asyncio

import pytest

from sartor.engine.request import Chunk, FinishReason, Request
from sartor.errors import SartorError
from sartor.graph import SamplingParams
from sartor.serving.answer import Answer
from sartor.serving.errors import internal
from sartor.serving.worker import _check_failures


def chunk(name: str, choice: int = 0, end: FinishReason | None = None) -> Chunk:
    return Chunk(name, choice, "ab", (1, 2), (), end, "boom", 3, 2, 1)


def answer_of(*names: str) -> tuple[Answer, list[str]]:
    aborts: list[str] = []
    requests = [Request(name, (1, 2, 3), SamplingParams(n=2), seed=1) for name in names]
    return Answer(requests, aborts.append), aborts


def test_what_nobody_reads_is_merged() -> None:
    answer, _ = answer_of("a", "b")
    for _ in range(1000):
        for choice in range(2):
            answer.push(chunk("a", choice), False)
    answer.push(chunk("b"), True)
    deltas = asyncio.run(answer.next())
    assert [(d.prompt, d.choice, len(d.text)) for d in deltas] == [
        (0, 0, 2000),
        (0, 1, 2000),
        (1, 0, 2),
    ]
    assert (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens) == (6, 4002, 2)


def test_the_end_and_errors_come_after_what_precedes_them() -> None:
    answer, aborts = answer_of("a", "b")
    answer.push(chunk("a"), False)
    answer.fail(internal("no"))
    assert aborts == ["a", "b"] or aborts == ["b", "a"]
    assert len(asyncio.run(answer.next())) == 1
    with pytest.raises(SartorError, match="no"):
        asyncio.run(answer.next())

    answer, aborts = answer_of("a")
    answer.push(chunk("a", 0, "stop"), False)
    answer.push(chunk("a", 1, "stop"), True)
    assert len(asyncio.run(answer.next())) == 2
    assert asyncio.run(answer.next()) == []
    answer.close()
    assert aborts == []


def test_leaving_early_aborts() -> None:
    answer, aborts = answer_of("a", "b")
    answer.push(chunk("a"), True)
    answer.close()
    answer.close()
    assert aborts == ["b"]


def test_a_step_that_fails_for_many_is_not_blamed_on_them() -> None:
    _check_failures([chunk("a", 0, "error"), chunk("a", 1, "error"), chunk("b", 0, "stop")])
    with pytest.raises(SartorError, match="2 requests: boom"):
        _check_failures([chunk("a", 0, "error"), chunk("b", 0, "error")])
