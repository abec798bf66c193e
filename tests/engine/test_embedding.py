"""Prompts with vectors in place of tokens."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from engine_helpers import (
    Engine,
    Layer,
    RandomWeights,
    byte_tokenizer,
    llama_program,
    make_engine,
    prompt,
    request,
    run,
    tokens,
)

from sartor.engine.embedding import EmbeddedRows, EmbeddingSegment
from sartor.engine.prompt import MixedPrompt, encode_prompt, prompt_list
from sartor.engine.request import Request
from sartor.errors import UsageError
from sartor.graph import Builder
from sartor.graph.batch import F32

IDS = prompt(1, 70)
HYBRID: tuple[Layer, ...] = (0, "recurrent", 24)


def vectors(seed: int, count: int, width: int = 2) -> F32:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def with_vectors(name: str, seed: int, *, start: int = 20, count: int = 30) -> Request:
    return request(name, IDS, segments=[EmbeddingSegment.of(start, vectors(seed, count))])


def one(engine: Engine, r: Request) -> tuple[list[int], int]:
    chunks = run(engine, r)[r.id, 0]
    return tokens(chunks), chunks[-1].cached_tokens


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("budget", [9, 512])
def test_embeddings_of_tokens_answer_like_the_tokens(budget: int, backend: str) -> None:
    table = RandomWeights(llama_program()).weight("embed.weight").dequantize()
    placeholders = (*IDS[:10], *[0] * 25, *IDS[35:50], *[7] * 5, *IDS[55:])
    segments = [
        EmbeddingSegment.of(50, table[list(IDS[50:55])]),
        EmbeddingSegment.of(10, table[list(IDS[10:35])]),
    ]
    answers = []
    for r in (
        request("t", IDS, logprobs=0),
        request("v", placeholders, segments=segments, logprobs=0),
    ):
        engine = make_engine(backend, windows=HYBRID, max_batch_tokens=budget)
        chunks = run(engine, r)[r.id, 0]
        answers.append([(c.tokens, c.logprobs) for c in chunks])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("layers", [(0,), (0, "recurrent", 24)])
def test_chunks_and_company_change_nothing(layers: tuple[Layer, ...]) -> None:
    requests = [with_vectors(f"r{i}", i, start=3 + 5 * i, count=1 + 9 * i) for i in range(4)]
    alone = [one(make_engine(windows=layers), r)[0] for r in requests]
    assert len(set(map(tuple, alone))) == 4
    for budget in (5, 16, 512):
        engine = make_engine(windows=layers, max_batch_tokens=budget)
        together = run(engine, *requests)
        assert [tokens(together[r.id, 0]) for r in requests] == alone


def test_a_preempted_request_embeds_again() -> None:
    requests = [
        request(
            f"r{i}",
            prompt(i, 40),
            max_tokens=60,
            segments=[EmbeddingSegment.of(4, vectors(i, 20))],
        )
        for i in range(4)
    ]
    tight = make_engine(blocks=15, context=200, prefix_cache=False)
    squeezed = run(tight, *requests)
    assert sum(record.preempted for record in tight.records) > 0
    assert {k: tokens(c) for k, c in squeezed.items()} == {
        k: tokens(c) for k, c in run(make_engine(blocks=256, context=200), *requests).items()
    }


def test_prefixes_are_shared_where_vectors_are_equal() -> None:
    engine = make_engine()
    first, cached = one(engine, with_vectors("a", 1))
    assert cached == 0
    assert one(engine, with_vectors("b", 1)) == (first, 64)
    # The blocks before the vectors are the same, those with vectors are not.
    other, cached = one(engine, with_vectors("c", 2))
    assert other != first
    assert cached == 16
    plain, cached = one(engine, request("d", IDS))
    assert plain not in (first, other)
    assert cached == 16
    # The same vectors elsewhere are something else.
    assert one(engine, with_vectors("e", 1, start=21))[1] == 16


def test_requests_that_arrive_together_share_by_vectors_too() -> None:
    engine = make_engine(max_batch_tokens=128)
    requests = [with_vectors(f"r{i}", i // 2) for i in range(4)]
    answers = run(engine, *requests)
    assert [answers[r.id, 0][-1].cached_tokens for r in requests] == [0, 64, 16, 64]
    assert len({tuple(tokens(answers[r.id, 0])) for r in requests}) == 2


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([(3, vectors(1, 4, 3))], "at 3 has vectors of 3 features, but the hidden size .* is 2"),
        ([(3, vectors(1, 4)), (6, vectors(1, 4))], "at 6 overlaps the one that ends at 7"),
        ([(68, vectors(1, 3))], "at 68 ends at 71, beyond the prompt of 70 tokens"),
        ([(0, np.array([[1.0, np.nan]], np.float32))], "at 0 has numbers that are not finite"),
    ],
)
def test_segments_that_do_not_fit(segments: list[tuple[int, F32]], message: str) -> None:
    engine = make_engine()
    given = [EmbeddingSegment.of(start, rows) for start, rows in segments]
    with pytest.raises(UsageError, match=message):
        engine.add(request("r", IDS, segments=given))
    assert not engine.has_work


def test_a_model_without_vectors_says_so() -> None:
    builder = Builder()
    x = builder.embedding(builder.token_ids, "embedding", 256, 2)
    x = builder.attention(x, x, x, heads=1, kv_heads=1, head_dim=2, scale=1.0)
    x = builder.gather_rows(x, builder.output_rows)
    engine = make_engine(program=builder.finish(builder.linear(x, "head", 256)))
    with pytest.raises(UsageError, match="takes tokens only"):
        engine.add(with_vectors("r", 1))


def test_impossible_segments() -> None:
    for make, message in (
        (lambda: EmbeddingSegment(-1, 2, bytes(8)), "start -1"),
        (lambda: EmbeddingSegment(0, 2, bytes(12)), "12 bytes are not whole"),
        (lambda: EmbeddingSegment(0, 2, b""), "0 bytes are not whole"),
        (lambda: EmbeddingSegment.of(5, np.zeros(3)), r"shape \[3\]"),
        (lambda: EmbeddingSegment.of(5, np.zeros((0, 3))), r"shape \[0, 3\]"),
        (lambda: EmbeddingSegment.of(5, np.array([["a"]])), "give numbers"),
    ):
        with pytest.raises(UsageError, match=message):
            make()


def test_a_request_with_vectors_crosses_processes() -> None:
    r = with_vectors("r", 1)
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(r), type=Request)
    assert again == r
    assert np.array_equal(again.segments[0].vectors, vectors(1, 30))


def test_rows_between_positions() -> None:
    rows = EmbeddedRows("r", [EmbeddingSegment.of(3, vectors(1, 4))], 10, 2)
    positions, given = rows.between(5, 9)
    assert positions.tolist() == [5, 6]
    assert np.array_equal(given, vectors(1, 4)[2:])
    assert rows.digest(7, 9) == b""
    assert rows.digest(0, 5) != rows.digest(0, 6)


# Prompts ------------------------------------------------------------------------------


def test_a_mixed_prompt_has_a_placeholder_for_every_vector() -> None:
    tokenizer = byte_tokenizer(bos=254)
    given = vectors(1, 3)
    ids, segments = encode_prompt(tokenizer, MixedPrompt(["ab", given, [1, 2], np.array([3]), "c"]))
    assert ids == (254, *b"ab", 0, 0, 0, 1, 2, 3, *b"c")
    assert [s.start for s in segments] == [3]
    assert np.array_equal(segments[0].vectors, given)
    ids, segments = encode_prompt(tokenizer, MixedPrompt([given, "ab"]))
    assert ids == (0, 0, 0, *b"ab")
    assert encode_prompt(tokenizer, "ab") == ((254, *b"ab"), ())
    with pytest.raises(UsageError, match="list of parts"):
        encode_prompt(tokenizer, MixedPrompt("ab"))
    with pytest.raises(UsageError, match=r"shape \[1, 2, 3\]"):
        encode_prompt(tokenizer, MixedPrompt([np.zeros((1, 2, 3))]))


def test_one_prompt_or_many() -> None:
    mixed = MixedPrompt(["a"])
    assert prompt_list(mixed) == [mixed]
    assert prompt_list([mixed, "b"]) == [mixed, "b"]
    assert prompt_list("a") == ["a"]
    assert prompt_list([1, 2]) == [[1, 2]]
    assert prompt_list([[1, 2], "b"]) == [[1, 2], "b"]
    assert prompt_list([]) == []
