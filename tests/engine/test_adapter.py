"""Low-rank adapters: many in one batch, each as if it were merged into the weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from engine_helpers import (
    VOCAB,
    Layer,
    RandomWeights,
    byte_tokenizer,
    llama_program,
    logprobs,
    make_engine,
    prompt,
    request,
    run,
    tokens,
)

from sartor.backends.registry import load_backend
from sartor.engine.engine import Engine
from sartor.errors import UnsupportedError, UsageError
from sartor.graph import Capabilities, LowRank
from sartor.ops import Weight, dense
from sartor.plan import ExecutionPlan

LAYERS: tuple[Layer, ...] = (0, "recurrent", 24)
IDS = prompt(1, 70)
ADAPTED = ("layers.0.q.weight", "layers.0.down.weight", "layers.1.o.weight", "head.weight")


def low_rank(seed: int, shape: tuple[int, ...], rank: int = 4) -> LowRank:
    rng = np.random.default_rng(seed)
    rows, columns = shape
    return LowRank(
        (rng.standard_normal((rank, columns)) * columns**-0.5).astype(np.float32),
        (rng.standard_normal((rows, rank)) * 0.5).astype(np.float32),
    )


def adapter(seed: int) -> dict[str, LowRank]:
    shapes = {spec.name: spec.shape for spec in llama_program(LAYERS).weights}
    return {name: low_rank(seed + i, shapes[name]) for i, name in enumerate(ADAPTED)}


def tiny(seed: int = 1) -> dict[str, LowRank]:
    """An adapter of the null program's head."""
    return {"head.weight": low_rank(seed, (VOCAB, 2))}


class Merged(RandomWeights):
    """Weights with an adapter worked in."""

    def __init__(self, layers: Mapping[str, LowRank]) -> None:
        super().__init__(llama_program(LAYERS))
        self._layers = layers

    def weight(self, name: str) -> Weight:
        plain = super().weight(name)
        if name not in self._layers:
            return plain
        layer = self._layers[name]
        return dense(name, plain.dequantize() + layer.up @ layer.down)


def merged_engine(layers: Mapping[str, LowRank]) -> Engine:
    program, chip = llama_program(LAYERS), load_backend("reference")
    plan = ExecutionPlan("reference", activation="fp32", kv="fp32", block_size=16)
    weights = chip.pack(program, Merged(layers), plan, None)
    executable = chip.compile(program, weights, plan, "reference")
    return Engine(
        executable,
        byte_tokenizer(),
        capabilities=chip.capabilities("reference"),
        context_length=512,
        model_key="test",
        state_blocks=[64] * 3,
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_adapter_equals_merged_weights_alone_and_in_company(backend: str) -> None:
    engine = make_engine(backend, windows=LAYERS)
    adapters = {name: adapter(seed) for name, seed in (("one", 10), ("two", 20), ("three", 30))}
    for name, layers in adapters.items():
        engine.load_adapter(name, layers)
    assert engine.adapters == ("one", "two", "three")
    names = ["", *adapters]
    answers = run(
        engine,
        *(
            request(f"{name}{i}", prompt(i, 30 + 7 * i), adapter=name, logprobs=0, max_tokens=6)
            for name in names
            for i in range(2)
        ),
    )
    found = set()
    for name in names:
        merged = merged_engine(adapters.get(name, {}))
        alone = make_engine(backend, windows=LAYERS)
        if name:
            alone.load_adapter(name, adapters[name])
        for i in range(2):
            r = request(f"{name}{i}", prompt(i, 30 + 7 * i), logprobs=0, max_tokens=6)
            expected = run(merged, r)[r.id, 0]
            together = answers[r.id, 0]
            assert tokens(together) == tokens(expected)
            np.testing.assert_allclose(logprobs(together), logprobs(expected), atol=2e-4)
            by_itself = run(
                alone,
                request(r.id, r.prompt, logprobs=0, max_tokens=6, adapter=name),
            )[r.id, 0]
            assert tokens(by_itself) == tokens(together)
            bound = 0 if backend == "cpu" else 1e-5  # numpy's matmul varies with shape
            np.testing.assert_allclose(logprobs(by_itself), logprobs(together), rtol=0, atol=bound)
            found.add(tuple(tokens(together)))
    assert len(found) == 8


def test_many_adapters_in_one_batch_equal_each_alone() -> None:
    engine = make_engine(windows=LAYERS, max_batch_tokens=40)
    for i in range(5):
        engine.load_adapter(f"a{i}", tiny(i))
    requests = [
        request(f"r{i}", prompt(i % 3, 50), adapter=f"a{i % 6}" if i % 6 < 5 else "")
        for i in range(18)
    ]
    together = run(engine, *requests)
    for r in requests:
        alone = make_engine(windows=LAYERS)
        if r.adapter:
            alone.load_adapter(r.adapter, tiny(int(r.adapter[1:])))
        assert tokens(run(alone, r)[r.id, 0]) == tokens(together[r.id, 0])


def cached(engine: Engine, adapter: str) -> int:
    return run(engine, request("r", IDS, adapter=adapter))["r", 0][-1].cached_tokens


def test_prefixes_are_shared_with_the_same_adapter_only() -> None:
    engine = make_engine()
    for name in ("one", "two"):
        engine.load_adapter(name, tiny())
    assert [cached(engine, name) for name in ("", "", "one", "one", "two", "two")] == [0, 64] * 3
    # A new adapter of an old name is another one, and so is one with an old number.
    engine.drop_adapter("one")
    engine.load_adapter("one", tiny(2))
    assert cached(engine, "one") == 0
    engine.drop_adapter("two")
    engine.load_adapter("three", tiny())
    assert cached(engine, "three") == 0
    assert cached(engine, "one") == 64


def test_an_adapter_in_use_is_freed_when_its_last_request_ends() -> None:
    engine = make_engine(max_sequences=1)
    freed: list[int] = []
    drop = engine.executable.drop_adapter

    def spy(index: int) -> None:
        freed.append(index)
        drop(index)

    engine.executable.drop_adapter = spy  # type: ignore[method-assign]
    engine.load_adapter("a", tiny(1))
    expected = {
        name: tokens(run(engine, request(name, IDS, adapter="a"))[name, 0]) for name in "rs"
    }
    for name in "rst":  # s and t wait while it is dropped
        engine.add(request(name, IDS, adapter="a"))
    engine.step()
    engine.drop_adapter("a")
    assert engine.adapters == ()
    with pytest.raises(UsageError, match="adapter 'a' is not loaded; none is"):
        engine.add(request("u", IDS, adapter="a"))
    # The number is taken until then, the name is not.
    engine.load_adapter("a", tiny(2))
    engine.add(request("u", IDS, adapter="a"))
    engine.abort("t")
    engine.step()
    assert freed == []
    answers: dict[str, list[int]] = {}
    while engine.has_work:
        for chunk in engine.step():
            answers.setdefault(chunk.request_id, []).extend(chunk.tokens)
        engine.check()
    assert freed == [0]
    assert answers["s"] == expected["s"]
    assert answers["u"] != expected["r"]
    engine.load_adapter("b", tiny(3))
    engine.drop_adapter("b")
    assert freed == [0, 0]


def test_reset_frees_dropped_adapters() -> None:
    engine = make_engine()
    engine.load_adapter("a", tiny())
    engine.add(request("r", IDS, adapter="a", n=2))
    engine.step()
    engine.drop_adapter("a")
    engine.reset()
    engine.load_adapter("b", tiny())
    assert run(engine, request("s", IDS, adapter="b"))["s", 0][-1].finish_reason == "length"


def test_unknown_adapters_are_refused_with_the_known_ones() -> None:
    engine = make_engine()
    for name in ("one", "two"):
        engine.load_adapter(name, tiny())
    with pytest.raises(UsageError, match="request r: adapter 'x' is not loaded; loaded are one, t"):
        engine.add(request("r", IDS, adapter="x"))
    assert not engine.has_work
    with pytest.raises(UsageError, match="adapter 'x' is not loaded"):
        engine.drop_adapter("x")


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("", tiny(), "needs a name"),
        ("old", tiny(), "old is loaded already"),
        ("a", {}, "adapts no layer"),
        ("a", {"embedding.weight": low_rank(1, (VOCAB, 2))}, "a: layer embedding.weight: the mod"),
        ("a", {"x": low_rank(1, (2, 2))}, "named like layers.0.q.weight"),
        ("a", {"head.weight": low_rank(1, (VOCAB, 3))}, r"head.weight: down \[4, 3\].*\[256, 2\]"),
        ("a", {"head.weight": low_rank(1, (VOCAB, 2), rank=0)}, r"down \[0, 2\]"),
        (
            "a",
            {"head.weight": LowRank(np.zeros((2, 2), "f4"), np.zeros((VOCAB, 3), "f4"))},
            r"down \[2, 2\] and up \[256, 3\]",
        ),
        (
            "a",
            {"head.weight": LowRank(np.full((1, 2), np.nan, "f4"), np.zeros((VOCAB, 1), "f4"))},
            "not finite",
        ),
    ],
)
def test_adapters_that_do_not_fit(name: str, layers: dict[str, LowRank], message: str) -> None:
    engine = make_engine()
    engine.load_adapter("old", tiny())
    with pytest.raises(UsageError, match=message):
        engine.load_adapter(name, layers)
    assert engine.adapters == ("old",)


def test_a_backend_without_adapters_says_so() -> None:
    ready = make_engine()
    engine = Engine(
        ready.executable,
        byte_tokenizer(),
        capabilities=Capabilities(frozenset()),
        context_length=64,
        model_key="test",
        state_blocks=[8],
    )
    with pytest.raises(UnsupportedError, match="backend null does not run adapters"):
        engine.load_adapter("a", tiny())
