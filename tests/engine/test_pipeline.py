"""An asynchronous backend runs one step while the engine prepares the next: same answers."""

from __future__ import annotations

import random

import numpy as np
import pytest
from engine_helpers import (
    EOS,
    Answers,
    Engine,
    Layer,
    counts,
    make_engine,
    prompt,
    request,
    run,
    tokens,
)

from sartor.engine.adapter import AdapterTable
from sartor.engine.request import Chunk, Request
from sartor.errors import SartorError
from sartor.graph import Batch, LowRank

ASYNC = "null-async"
LAYOUTS: list[tuple[Layer, ...]] = [(0,), (40,), (0, "recurrent", 24)]
layouts = pytest.mark.parametrize("layers", LAYOUTS)


def workload(rng: random.Random, count: int) -> list[Request]:
    """Prompts that share beginnings; ends by length, end of text, stop string and stop token."""
    stems = [prompt(i, 70) for i in range(3)]
    return [
        request(
            f"r{i}",
            (*rng.choice(stems)[: rng.randint(1, 70)], *prompt(i, rng.randint(0, 40))),
            seed=i,
            n=rng.choice([1, 1, 3]),
            priority=rng.choice([0, 0, 1]),
            max_tokens=rng.choice([1, 2, 7, 40]),
            temperature=rng.choice([0.0, 1.0]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
            logprobs=rng.choice([None, 2]),
            ignore_eos=rng.choice([True, False]),
            stop_token_ids=tuple(rng.sample(range(EOS), 8)),
            stop=rng.choice([(), ("a", "b c", "\x01")]),
        )
        for i in range(count)
    ]


def drive(engine: Engine, requests: list[Request], aborts: dict[int, str], gap: int) -> Answers:
    """Requests arrive ``gap`` steps apart; ``aborts`` are by step."""
    answers: Answers = {}
    step = 0
    left = list(requests)
    while engine.has_work or left:
        if left and step % gap == 0:
            engine.add(left.pop(0))
        if step in aborts:
            engine.abort(aborts[step])
        for chunk in engine.step():
            answers.setdefault((chunk.request_id, chunk.choice), []).append(chunk)
        engine.check()
        step += 1
    assert not any(engine.blocks_held())
    return answers


def content(chunks: list[Chunk]) -> list[tuple[object, ...]]:
    """All of the chunks but how much of the prompt was cached: that is a matter of timing."""
    return [
        (c.text, c.tokens, c.logprobs, c.finish_reason, c.error, c.completion_tokens)
        for c in chunks
    ]


@layouts
@pytest.mark.parametrize("seed", range(6))
def test_chunks_equal_the_synchronous_engines(layers: tuple[Layer, ...], seed: int) -> None:
    rng = random.Random(seed)
    requests = workload(rng, 14)
    aborts = {rng.randint(1, 60): f"r{i}" for i in range(0, 14, 4)}
    gap = rng.choice([1, 2, 5])
    tight = {
        "blocks": counts(layers, 14, 4),
        "context": 170,
        "max_batch_tokens": rng.choice([6, 20, 64]),
        "max_sequences": 5,
        "prefix_cache": rng.choice([True, False]),
    }
    synchronous = make_engine(windows=layers, **tight)  # type: ignore[arg-type]
    plain = drive(synchronous, requests, aborts, gap)
    pipelined = make_engine(windows=layers, device=ASYNC, **tight)  # type: ignore[arg-type]
    flying = drive(pipelined, requests, aborts, gap)
    assert plain.keys() == flying.keys()
    for key, chunks in plain.items():
        one, other = content(chunks), content(flying[key])
        if "abort" in (chunks[-1].finish_reason, flying[key][-1].finish_reason):
            # It came at another moment of the answer, which is the same up to there.
            shorter = min(len(one), len(other)) - 1
            assert one[:shorter] == other[:shorter]
        else:
            assert one == other


@layouts
def test_preempted_equals_uninterrupted(layers: tuple[Layer, ...]) -> None:
    requests = [request(f"r{i}", prompt(i, 40), max_tokens=60) for i in range(4)]
    tight = make_engine(windows=layers, blocks=15, context=200, device=ASYNC)
    squeezed = run(tight, *requests)
    assert sum(record.preempted for record in tight.records) > 0 or 0 not in layers
    roomy = run(make_engine(windows=layers, blocks=256, context=200), *requests)
    assert {k: content(c) for k, c in squeezed.items()} == {k: content(c) for k, c in roomy.items()}


def spy(engine: Engine) -> list[tuple[str, int]]:
    """Calls of submit and collect with their handles."""
    calls: list[tuple[str, int]] = []
    submit, collect = engine.executable.submit, engine.executable.collect

    def watched(batch: Batch) -> int:
        handle = submit(batch)
        calls.append(("submit", handle))
        return handle

    engine.executable.submit = watched  # type: ignore[method-assign]
    engine.executable.collect = lambda handle: (  # type: ignore[method-assign]
        calls.append(("collect", handle)) or collect(handle)
    )
    return calls


def test_the_next_step_is_submitted_before_the_last_is_collected() -> None:
    engine = make_engine(device=ASYNC)
    calls = spy(engine)
    engine.add(request("r", prompt(1, 20), max_tokens=4))
    assert engine.step() == []
    chunks = [engine.step() for _ in range(4)]
    assert [len(c) for c in chunks] == [1, 1, 1, 1]
    # The last token is known to be the last: nothing is submitted after it.
    assert calls == [
        ("submit", 0),
        ("submit", 1),
        ("collect", 0),
        ("submit", 2),
        ("collect", 1),
        ("submit", 3),
        ("collect", 2),
        ("collect", 3),
    ]
    assert not engine.has_work
    assert len(engine.records) == 4


def test_a_synchronous_engine_collects_at_once() -> None:
    engine = make_engine()
    calls = spy(engine)
    run(engine, request("r", prompt(1, 20), max_tokens=2))
    assert calls == [("submit", 0), ("collect", 0), ("submit", 1), ("collect", 1)]


def test_rows_that_need_the_host_wait_for_their_token() -> None:
    engine = make_engine(device=ASYNC)
    submitted: list[tuple[int, int]] = []
    submit = engine.executable.submit

    def watched(batch: Batch) -> int:
        submitted.append((len(batch.starts) - 1, int((batch.tokens < 0).sum())))
        return submit(batch)

    engine.executable.submit = watched  # type: ignore[method-assign]
    requests = [
        request("free", prompt(1, 20), max_tokens=6),
        request("host", prompt(2, 20), max_tokens=6, frequency_penalty=0.5),
    ]
    answers = run(engine, *requests)
    # One runs in every step on tokens in flight, the other in every second on known ones.
    assert submitted[0] == (2, 0)
    assert submitted[1:6] == [(1, 1), (2, 1), (1, 1), (2, 1), (1, 1)]
    plain = run(make_engine(), *requests)
    assert {k: tokens(c) for k, c in answers.items()} == {k: tokens(c) for k, c in plain.items()}


def test_a_surplus_row_is_dropped() -> None:
    ids = prompt(1, 20)
    (answer,) = run(make_engine(), request("r", ids)).values()
    last = tokens(answer)[3]
    first = tokens(answer).index(last)
    engine = make_engine(device=ASYNC)
    engine.add(request("r", ids, stop_token_ids=(last,)))
    chunks: list[Chunk] = []
    while not chunks or chunks[-1].finish_reason is None:
        chunks += engine.step()
    assert tokens(chunks) == tokens(answer)[: first + 1]
    # Its surplus row is still in flight, its blocks are free already.
    assert engine.has_work
    assert not any(engine.blocks_held())
    engine.check()
    other = request("s", prompt(2, 60))
    assert content(run(engine, other)["s", 0]) == content(run(make_engine(), other)["s", 0])


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_abort_and_reset_with_a_step_in_flight(steps: int) -> None:
    other = request("s", prompt(1, 60))
    expected = tokens(run(make_engine(), other)["s", 0])
    for reset in (False, True):
        engine = make_engine(device=ASYNC, max_batch_tokens=32, windows=(0, 40))
        expected = tokens(run(make_engine(windows=(0, 40)), other)["s", 0])
        engine.add(request("r", prompt(1, 60), n=2))
        for _ in range(steps):
            engine.step()
        if reset:
            engine.reset()
        else:
            engine.abort("r")
        engine.check()
        assert not any(engine.blocks_held())
        answers = run(engine, other)
        assert [c.finish_reason for key in answers for c in answers[key][-1:]].count("abort") == 2
        assert tokens(answers["s", 0]) == expected


@pytest.mark.parametrize("part", ["submit", "collect"])
def test_a_failed_step_takes_only_its_own_requests(part: str) -> None:
    engine = make_engine(device=ASYNC, max_sequences=2)
    for name in "abc":
        engine.add(request(name, prompt(ord(name), 20), max_tokens=5))
    for _ in range(2):
        engine.step()
    real = getattr(engine.executable, part)
    left = [1]

    def fail(argument: object) -> object:
        if left and part == "submit":
            left.pop()
            raise SartorError("broken chip")
        result = real(argument)
        if left:
            left.pop()
            raise SartorError("broken chip")
        return result

    setattr(engine.executable, part, fail)
    answers = run(engine)
    assert {key[0]: chunks[-1].finish_reason for key, chunks in answers.items()} == {
        "a": "error",
        "b": "error",
        "c": "length",
    }
    alone = run(make_engine(), request("c", prompt(ord("c"), 20), max_tokens=5))
    assert tokens(answers["c", 0]) == tokens(alone["c", 0])


def test_an_adapter_goes_when_its_last_request_does() -> None:
    layers = {"head.weight": LowRank(np.ones((1, 2), np.float32), np.ones((256, 1), np.float32))}
    ids = prompt(1, 20)
    plain = make_engine()
    plain.load_adapter("a", layers)
    whole = tokens(run(plain, request("r", ids, adapter="a"))["r", 0])
    engine = make_engine(device=ASYNC)
    engine.load_adapter("a", layers)
    engine.add(request("r", ids, adapter="a", stop_token_ids=(whole[4],)))
    engine.step()
    engine.drop_adapter("a")
    answers = run(engine)
    assert tokens(answers["r", 0]) == whole[: whole.index(whole[4]) + 1]
    assert isinstance(engine._adapters, AdapterTable)
    assert engine._adapters._numbers == set()


def test_sharing_waits_for_state_that_is_there() -> None:
    engine = make_engine(device=ASYNC, max_batch_tokens=32)
    ids = prompt(1, 100)
    answers = run(engine, *(request(f"r{i}", (*ids, i)) for i in range(8)))
    assert [answers[f"r{i}", 0][-1].cached_tokens for i in range(8)] == [0] + [96] * 7
