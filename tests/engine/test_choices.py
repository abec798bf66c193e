"""Choices of one request go on from a prompt that was computed once, and answer as if alone."""

from __future__ import annotations

import pytest
from engine_helpers import BACKENDS, Layer, logprobs, make_engine, prompt, request, run, tokens

from sartor.engine.request import Request

WINDOWS: dict[str, tuple[Layer, ...]] = {"full": (0,), "mixed": (0, 40, 24)}

cases = pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
caches = pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])


def drawn(length: int, n: int = 3, **params: object) -> Request:
    fields = {"temperature": 0.9, "logprobs": 0, "max_tokens": 20}
    return request("a", prompt(6, length), n=n, **{**fields, **params})  # type: ignore[arg-type]


def alone(r: Request, choice: int, backend: str, windows: tuple[Layer, ...]) -> list[list[float]]:
    """Tokens and log probabilities of a choice whose others have ended."""
    params = {"n": r.params.n, "temperature": r.params.temperature, "logprobs": 0}
    others = [[1] * 20 if c != choice else [] for c in range(r.params.n)]
    lone = request("a", r.prompt, seed=r.seed, emitted=others, max_tokens=20, **params)  # type: ignore[arg-type]
    chunks = run(make_engine(backend, windows=windows), lone)["a", choice]
    return [tokens(chunks), logprobs(chunks)]


@pytest.mark.parametrize("backend", BACKENDS)
@cases
@caches
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 70, 96])
def test_the_prompt_is_computed_once(
    backend: str, windows: tuple[Layer, ...], cache: bool, length: int
) -> None:
    # With numpy another shape is another rounding: what is likeliest by far stays the same.
    r = drawn(length, temperature=0.0 if backend == "reference" else 0.9)
    engine = make_engine(backend, windows=windows, prefix_cache=cache)
    together = run(engine, r)
    computed = sum(record.prompt_tokens + record.decode_tokens for record in engine.records)
    # The first one computes all, each other one the last; then all tokens but the last drawn.
    assert computed == length + 2 + 3 * 19
    cached = [together["a", choice][-1].cached_tokens for choice in range(3)]
    assert cached == [0, length - 1, length - 1]
    for choice in range(3):
        chunks, expected = together["a", choice], alone(r, choice, backend, windows)
        assert tokens(chunks) == expected[0]
        if backend != "reference":
            assert logprobs(chunks) == expected[1]


@cases
@caches
@pytest.mark.parametrize("device", ["null", "null-async"])
@pytest.mark.parametrize("places", [2, 8])
def test_choices_that_start_late_go_on_from_one_that_runs(
    windows: tuple[Layer, ...], cache: bool, device: str, places: int
) -> None:
    """Late as there is no place, or as the step with the prompt is still in flight."""
    r = drawn(35, n=5)
    engine = make_engine(
        windows=windows, prefix_cache=cache, device=device, max_sequences=places, max_batch_tokens=9
    )
    together = run(engine, r)
    if places > 5:
        # The first one's chunks of 9 end with a larger one than 1.
        assert sum(record.prompt_tokens for record in engine.records) == 35
    for choice in range(5):
        assert tokens(together["a", choice]) == alone(r, choice, "null", windows)[0]


@cases
@caches
def test_a_window_that_slid_on_costs_no_answer(windows: tuple[Layer, ...], cache: bool) -> None:
    """At 71 tokens the first block that the last token sees is given back with that token."""
    r = drawn(71)
    engine = make_engine(windows=windows, prefix_cache=cache)
    together = run(engine, r)
    again = 70 if cache or windows == (0,) else 0
    assert [together["a", c][-1].cached_tokens for c in range(3)] == [0, again, again]
    for choice in range(3):
        assert tokens(together["a", choice]) == alone(r, choice, "null", windows)[0]


@cases
@caches
def test_interrupted_choices_go_on_from_one_that_runs(
    windows: tuple[Layer, ...], cache: bool
) -> None:
    r = drawn(40, n=4, max_tokens=60)
    whole = run(make_engine(windows=windows, blocks=256, prefix_cache=cache), r)
    tight = make_engine(windows=windows, blocks=12, context=200, prefix_cache=cache)
    squeezed = run(tight, r)
    assert sum(record.preempted for record in tight.records)
    # After a crash: the choices had come differently far.
    emitted = [tokens(whole["a", c])[: 7 * c] for c in range(4)]
    again = request(
        "a", r.prompt, seed=r.seed, emitted=emitted, n=4, temperature=0.9, max_tokens=60
    )
    rest = run(make_engine(windows=windows, prefix_cache=cache), again)
    for choice in range(4):
        expected = tokens(whole["a", choice])
        assert tokens(squeezed["a", choice]) == expected
        assert tokens(rest["a", choice]) == expected[7 * choice :]


@caches
def test_an_abort_gives_every_block_back(cache: bool) -> None:
    engine = make_engine(prefix_cache=cache)
    for steps in range(5):
        engine.add(drawn(35))
        for _ in range(steps):
            engine.step()
            engine.check()
        engine.abort("a")
        engine.check()
        assert not any(engine.blocks_held())
        run(engine)
