"""SentencePiece BPE: the same ids as the library that trained the vocabulary."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from sartor.errors import FormatError, UnsupportedError
from sartor.text.sentencepiece import Splitter
from sartor.text.tokenizer import Tokenizer, tokenizer_from_folder, tokenizer_from_gguf

USER = ["<sep>", "\u2581\u2581", "\u2581\u2581\u2581", "\n", "\n\n"]


def train(page: str, **options: object) -> bytes:
    model = io.BytesIO()
    settings_: dict[str, object] = {
        "model_type": "bpe",
        "vocab_size": 900,
        "character_coverage": 0.98,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": True,
        "minloglevel": 2,
        **options,
    }
    text = page * 3 + " the then there they thus banana bananas anna aaaa aaaaaa" * 20
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=model, **settings_
    )
    return model.getvalue()


def to_gguf(model: spm.SentencePieceProcessor, **more: object) -> dict[str, object]:
    ids = range(model.get_piece_size())

    def kind(i: int) -> int:
        if model.is_byte(i):
            return 6
        if model.is_control(i):
            return 3
        if model.is_unknown(i):
            return 2
        if model.is_unused(i):
            return 5
        return 4 if model.id_to_piece(i) in USER else 1

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": np.array([model.get_score(i) for i in ids], np.float32),
        "tokenizer.ggml.token_type": np.array([kind(i) for i in ids], np.int32),
        "tokenizer.ggml.bos_token_id": np.uint32(1),
        "tokenizer.ggml.eos_token_id": np.uint32(2),
        "tokenizer.ggml.unknown_token_id": np.uint32(0),
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


Pair = tuple[spm.SentencePieceProcessor, Tokenizer]


@pytest.fixture(scope="module")
def llama(page: str) -> Pair:
    model = spm.SentencePieceProcessor(model_proto=train(page))
    return model, tokenizer_from_gguf(to_gguf(model))


@pytest.fixture(scope="module")
def gemma(page: str) -> Pair:
    model = spm.SentencePieceProcessor(
        model_proto=train(page, add_dummy_prefix=False, user_defined_symbols=USER)
    )
    return model, tokenizer_from_gguf(to_gguf(model, add_space_prefix=False))


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_ids_and_text_equal_sentencepiece(
    name: str, lines: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    model, ours = request.getfixturevalue(name)
    for line in (*lines, "a <sep> b", "<sep>x", "   x    y"):
        ids = model.encode(line)
        assert ours.encode(line, add_special=False) == ids
        assert ours.decode(ids) == model.decode(ids)


TEXT = st.text(st.sampled_from("abnthe \u2581\n<sp>1é漢😀"), max_size=60) | st.text(max_size=40)


@given(TEXT)
@settings(max_examples=300, deadline=None)
def test_any_text_equals_sentencepiece(llama: Pair, gemma: Pair, text: str) -> None:
    for model, ours in (llama, gemma):
        assert ours.encode(text, add_special=False, parse_special=False) == model.encode(text)


def test_pieces_across_spaces_are_found(page: str) -> None:
    model = spm.SentencePieceProcessor(model_proto=train(page, split_by_whitespace=False))
    assert any("\u2581" in model.id_to_piece(i)[1:].lstrip("\u2581") for i in range(900))
    ours = tokenizer_from_gguf(to_gguf(model))
    for line in page.splitlines():
        assert ours.encode(line, add_special=False) == model.encode(line)


def test_without_bytes_unknown_characters_fuse(page: str) -> None:
    model = spm.SentencePieceProcessor(model_proto=train(page, byte_fallback=False))
    ours = tokenizer_from_gguf(to_gguf(model))
    for line in ("abc ⌘⌘⌘ abc", "⌘", "x⌘ ⌘y"):
        assert ours.encode(line, add_special=False) == model.encode(line)


def test_unused_pieces_are_taken_apart_again(llama: Pair) -> None:
    model, _ = llama
    metadata = to_gguf(model)
    tokens, types = list(metadata["tokenizer.ggml.tokens"]), metadata["tokenizer.ggml.token_type"]
    the = tokens.index("\u2581the")
    types[the] = 5
    ids = tokenizer_from_gguf(metadata).encode("the there", add_special=False)
    assert the not in ids
    assert tokens.index("\u2581there") in ids  # still a stepping stone
    assert tokenizer_from_gguf(metadata).decode(ids) == "the there"


def test_control_tokens_and_bos(llama: Pair) -> None:
    model, ours = llama
    assert ours.add_bos
    assert ours.encode("hi") == [1, *model.encode("hi")]
    assert ours.encode("<s>hi</s>yo", add_special=False) == [
        1, *model.encode("hi"), 2, *model.encode("yo"),
    ]  # fmt: skip
    assert ours.encode("<s>", add_special=False, parse_special=False) == model.encode("<s>")
    assert ours.eos_ids == {2}
    assert ours.special_ids == {0, 1, 2}


def test_bytes_of_tokens(llama: Pair) -> None:
    _, ours = llama
    ids = ours.encode("☃ the", add_special=False)
    assert b"".join(map(ours.token_bytes, ids)) == " ☃ the".encode()
    assert ours.decode(ids) == "☃ the"
    snow = [i for i in range(ours.vocab_size) if ours.token_bytes(i) == b"\xe2"]
    assert ours.token_text(snow[0]) == "\ufffd"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [0.0, 1.0]}, "tokenizer.ggml.scores has 2 entries for 900 tokens"),
        ({"scores": None}, "tokenizer.ggml.scores is missing"),
        ({"scores": ["a"] * 900}, "tokenizer.ggml.scores must be an array of numbers"),
        ({"token_type": None}, "tokenizer.ggml.token_type is missing"),
        ({"precompiled_charsmap": "abc"}, "tokenizer.ggml.precompiled_charsmap must be"),
        ({"precompiled_charsmap": [1, 2]}, "tokenizer.ggml.precompiled_charsmap"),
        ({"add_space_prefix": 7}, "tokenizer.ggml.add_space_prefix must be a boolean"),
    ],
)
def test_damaged_metadata_is_named(llama: Pair, change: dict[str, object], message: str) -> None:
    changed = {**to_gguf(llama[0]), **{f"tokenizer.ggml.{k}": v for k, v in change.items()}}
    changed = {k: v for k, v in changed.items() if v is not None}
    with pytest.raises(FormatError, match=message):
        tokenizer_from_gguf(changed)


def test_long_runs_do_not_hang(gemma: Pair) -> None:
    for text in ("a" * 50_000, " " * 100_000, "\n" * 50_000, "漢" * 20_000, "ab" * 20_000):
        assert gemma[1].decode(gemma[1].encode(text)) == text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False, "user_defined_symbols": USER},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    ],
)
def test_a_model_file_alone_is_enough(
    tmp_path: Path, page: str, lines: tuple[str, ...], options: dict[str, object]
) -> None:
    data = train(page, **options)
    (tmp_path / "tokenizer.model").write_bytes(data)
    model = spm.SentencePieceProcessor(model_proto=data)
    ours = tokenizer_from_folder(tmp_path)
    assert (ours.bos_id, ours.eos_ids) == (1, frozenset({2}))
    for line in lines:
        assert ours.encode(line, add_special=False) == model.encode(line)


def test_other_model_files_are_refused(tmp_path: Path, page: str) -> None:
    data = train(page, model_type="unigram", hard_vocab_limit=False)
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(UnsupportedError, match=r"unigram model.*tokenizer\.json"):
        tokenizer_from_folder(tmp_path)
    for damaged in (b"", b"not a model", data[: len(data) // 2], b"\xff" * 40):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(FormatError, match=r"tokenizer\.model is not a SentencePiece model"):
            tokenizer_from_folder(tmp_path)


def test_splitter_takes_the_leftmost_longest() -> None:
    splitter = Splitter({"ab": 1, "abc": 2, "b": 3, "cab": 4})
    assert list(splitter.split("xabcab")) == [("x", None), ("abc", 2), ("ab", 1)]
    assert list(splitter.split("bb-a")) == [("b", 3), ("b", 3), ("-a", None)]
    assert list(Splitter({}).split("ab")) == [("ab", None)]
    assert list(splitter.split("")) == []
