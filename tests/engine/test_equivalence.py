"""Answers do not depend on company, chunking, caching, interruption or replay."""

from __future__ import annotations

import pytest
from engine_helpers import (
    BACKENDS,
    Answers,
    Engine,
    Layer,
    logprobs,
    make_engine,
    prompt,
    request,
    run,
    tokens,
)

from sartor.engine.request import Request

WINDOWS: dict[str, tuple[Layer, ...]] = {
    "full": (0,),
    "window": (40,),
    "mixed": (0, 40, 24),
    "recurrent": ("recurrent",),
    "hybrid": (0, "recurrent", 24),
}

cases = pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS.keys())
backends = pytest.mark.parametrize("backend", BACKENDS)


def sampled(name: str, ids: tuple[int, ...], **params: object) -> Request:
    """Penalties make the answer depend on the history too."""
    fields = {"temperature": 0.8, "top_p": 0.9, "frequency_penalty": 0.3, "logprobs": 0}
    return request(name, ids, **{**fields, **params})  # type: ignore[arg-type]


def greedy(name: str, ids: tuple[int, ...], **params: object) -> Request:
    return request(name, ids, **{"logprobs": 0, **params})  # type: ignore[arg-type]


def assert_equal(engine: Engine, one: Answers, other: Answers) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert tokens(one[key]) == tokens(other[key])
        if engine.executable.plan.backend != "reference":  # numpy's matmul varies with shape
            assert logprobs(one[key]) == logprobs(other[key])


def requests_of(backend: str) -> list[Request]:
    kind = greedy if backend == "reference" else sampled
    return [kind(f"r{i}", prompt(i, 1 + 13 * i % 90), seed=i) for i in range(16)]


@backends
@cases
def test_alone_equals_in_company(backend: str, windows: tuple[Layer, ...]) -> None:
    requests = requests_of(backend)
    engine = make_engine(backend, windows=windows, blocks=256)
    together = run(engine, *requests)
    apart: Answers = {}
    for r in requests[::3]:
        apart |= run(make_engine(backend, windows=windows, blocks=256), r)
    assert_equal(engine, apart, {key: together[key] for key in apart})


@backends
@cases
def test_chunk_sizes_agree(backend: str, windows: tuple[Layer, ...]) -> None:
    ids = prompt(1, 150)
    engine = make_engine(backend, windows=windows, max_batch_tokens=512)
    whole = run(engine, greedy("a", ids))
    for size in (1, 7, 32):
        chunked = run(
            make_engine(backend, windows=windows, max_batch_tokens=size), greedy("a", ids)
        )
        assert_equal(engine, whole, chunked)


@backends
@cases
def test_prefix_cache_changes_nothing(backend: str, windows: tuple[Layer, ...]) -> None:
    ids = prompt(2, 100)
    engine = make_engine(backend, windows=windows)
    cold = run(engine, greedy("a", ids))
    warm = run(engine, greedy("a", ids))
    off = run(make_engine(backend, windows=windows, prefix_cache=False), greedy("a", ids))
    assert_equal(engine, cold, off)
    assert_equal(engine, cold, warm)
    assert cold["a", 0][-1].cached_tokens == 0
    assert warm["a", 0][-1].cached_tokens == 96
    # A longer conversation goes on from what was generated.
    longer = (*ids, *tokens(cold["a", 0]), *prompt(3, 20))
    warm = run(engine, greedy("b", longer))
    assert warm["b", 0][-1].cached_tokens == 96
    assert_equal(engine, warm, run(make_engine(backend, windows=windows), greedy("b", longer)))


@backends
@cases
def test_preempted_equals_uninterrupted(backend: str, windows: tuple[Layer, ...]) -> None:
    requests = [
        (greedy if backend == "reference" else sampled)(f"r{i}", prompt(i, 40), max_tokens=60)
        for i in range(4)
    ]
    for cache in (True, False):
        tight = make_engine(backend, windows=windows, blocks=15, context=200, prefix_cache=cache)
        squeezed = run(tight, *requests)
        assert sum(record.preempted for record in tight.records) > 0 or 0 not in windows
        roomy = make_engine(backend, windows=windows, blocks=256, context=200, prefix_cache=cache)
        assert_equal(tight, squeezed, run(roomy, *requests))
        assert sum(record.preempted for record in roomy.records) == 0


@backends
@cases
@pytest.mark.parametrize("done", [0, 1, 5, 11])
def test_replay_equals_uninterrupted(backend: str, windows: tuple[Layer, ...], done: int) -> None:
    kind = greedy if backend == "reference" else sampled
    ids = prompt(5, 37)
    engine = make_engine(backend, windows=windows)
    whole = run(engine, kind("a", ids))
    before, after = tokens(whole["a", 0])[:done], whole["a", 0][done:]
    rest = run(make_engine(backend, windows=windows), kind("a", ids, emitted=[before]))
    assert tokens(rest["a", 0]) == tokens(after)
    assert [c.text for c in rest["a", 0]] == [c.text for c in after]
    assert [c.completion_tokens for c in rest["a", 0]] == [c.completion_tokens for c in after]


@pytest.mark.parametrize("backend", ["reference", "cpu-int8", "torch"])
def test_copied_blocks_bring_their_scales(backend: str) -> None:
    ids = prompt(6, 70)
    engine = make_engine(backend, kv="int8")
    together = run(engine, greedy("a", ids, n=2))
    assert sum(r.prompt_tokens for r in engine.records) == 70
    alone = run(make_engine(backend, kv="int8"), greedy("a", ids))
    for choice in range(2):
        assert tokens(together["a", choice]) == tokens(alone["a", 0])


@backends
@cases
def test_choices_equal_requests_with_a_choice_index(
    backend: str, windows: tuple[Layer, ...]
) -> None:
    kind = greedy if backend == "reference" else sampled
    ids = prompt(6, 70)
    engine = make_engine(backend, windows=windows)
    together = run(engine, kind("a", ids, n=3))
    # The prompt is computed once, but for its last token. Where a state is recurrent, choices
    # share its whole blocks, and each computes the rest by itself.
    recurrent = "recurrent" in windows
    shared = 64 if recurrent else 69
    assert [together["a", c][-1].cached_tokens for c in range(3)] == [0, shared, shared]
    assert sum(r.prompt_tokens for r in engine.records) == 70 + (2 * 6 if recurrent else 0)
    for choice in range(3):
        # A request whose other choices have ended already runs just the one.
        emitted = [tokens(together["a", c]) if c != choice else [] for c in range(3)]
        alone = run(make_engine(backend, windows=windows), kind("a", ids, n=3, emitted=emitted))
        assert tokens(alone["a", choice]) == tokens(together["a", choice])
        assert [tokens(alone["a", c]) for c in range(3) if c != choice] == [[], []]
    if kind is sampled:
        assert len({tuple(tokens(together["a", c])) for c in range(3)}) == 3
