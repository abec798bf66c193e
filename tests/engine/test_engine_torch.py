"""The engine on the torch backend: company, chunks, caches and preemption change nothing."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

pytest.importorskip("torch")

from engine_helpers import (
    Answers,
    Layer,
    counts,
    logprobs,
    make_engine,
    prompt,
    request,
    run,
    tokens,
)

from sartor.backends.torch.executable import TorchExecutable
from sartor.engine.engine import Engine

LAYERS: dict[str, tuple[Layer, ...]] = {
    "mixed": (0, 40),
    "hybrid": (0, "recurrent", 24),
}
layers = pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)


def engine_of(layers: Sequence[Layer], blocks: int = 128, **plan: object) -> Engine:
    """Static steps as on a GPU, but without graphs."""
    given = counts(layers, blocks, 40)
    engine = make_engine("torch", windows=layers, blocks=given, context=200, threads=1, **plan)
    assert isinstance(engine.executable, TorchExecutable)
    engine.executable.bucketed = True
    return engine


def assert_close(one: Answers, other: Answers) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert tokens(one[key]) == tokens(other[key])
        assert logprobs(one[key]) == pytest.approx(logprobs(other[key]), abs=1e-4)


@layers
def test_alone_in_company_in_chunks_and_from_cache(layers: Sequence[Layer]) -> None:
    requests = [
        request(f"r{i}", prompt(i, 1 + 23 * i), logprobs=0, max_tokens=8, frequency_penalty=0.2)
        for i in range(5)
    ]
    together = run(engine_of(layers), *requests)
    apart: Answers = {}
    engine = engine_of(layers, max_batch_tokens=19)
    for r in requests:
        apart |= run(engine, r)
    assert_close(together, apart)
    again = run(engine, requests[4])
    assert again["r4", 0][-1].cached_tokens
    assert_close(again, {key: together[key] for key in again})


def test_preempted_equals_uninterrupted() -> None:
    requests = [
        request(f"r{i}", prompt(i, 40), max_tokens=30, temperature=0.8, top_p=0.9, seed=i)
        for i in range(4)
    ]
    tight = engine_of((0, 40), blocks=14)
    squeezed = run(tight, *requests)
    assert sum(record.preempted for record in tight.records)
    roomy = run(engine_of((0, 40)), *requests)
    assert {key: tokens(chunks) for key, chunks in squeezed.items()} == {
        key: tokens(chunks) for key, chunks in roomy.items()
    }


@pytest.mark.parametrize("cache", [True, False])
def test_choices_go_on_from_one_prompt(cache: bool) -> None:
    r = request("a", prompt(6, 70), n=3, temperature=0.8, logprobs=0)
    engine = engine_of((0, 40), prefix_cache=cache)
    together = run(engine, r)
    assert sum(record.prompt_tokens for record in engine.records) == 70
    for choice in range(3):
        others = [[1] * 12 if c != choice else [] for c in range(3)]
        lone = request("a", r.prompt, n=3, temperature=0.8, logprobs=0, emitted=others)
        alone = run(engine_of((0, 40)), lone)
        assert_close({("a", choice): together["a", choice]}, {("a", choice): alone["a", choice]})
