"""Vocabularies as tables: what they hold, and what becomes of damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sartor.errors import FormatError
from sartor.text.vocabulary import (
    LAYOUT_VERSION,
    Vocabulary,
    load_vocabulary,
    make_vocabulary,
    save_vocabulary,
    vocabulary_path,
)

TOKENS = ["a", "b", "c", "ab", "abc", "bc", "Ġ", "é", "漢字", "😀", "\ud800", " "]
MERGES = ["a b", "ab c", "b c", "a bc"]


def same(left: Vocabulary, right: Vocabulary) -> bool:
    return (
        left[:] == right[:]
        and left.merges() == right.merges()
        and left.spaced == right.spaced
        and all(left.find(token) == right.find(token) for token in left)
    )


@given(st.lists(st.text(min_size=1, max_size=6), unique=True, max_size=60), st.text(max_size=6))
def test_texts_and_ids(tokens: list[str], other: str) -> None:
    vocabulary = make_vocabulary(tokens)
    assert len(vocabulary) == len(tokens)
    assert [*vocabulary] == vocabulary[:] == tokens
    assert vocabulary[1:3] == tokens[1:3]
    assert vocabulary.of(range(len(tokens))) == tokens
    assert [vocabulary.find(token) for token in tokens] == [*range(len(tokens))]
    assert vocabulary.find(other) == (tokens.index(other) if other in tokens else None)


def test_ids_outside_of_it() -> None:
    vocabulary = make_vocabulary(TOKENS)
    for token in (-1, len(TOKENS)):
        with pytest.raises(IndexError):
            vocabulary[token]


def test_equal_checksums_are_told_apart() -> None:
    # Two strings of equal CRC-32.
    first, second = "plumless", "buckeroo"
    import zlib

    assert zlib.crc32(first.encode()) == zlib.crc32(second.encode())
    vocabulary = make_vocabulary([second, "x", first])
    assert (vocabulary.find(first), vocabulary.find(second)) == (2, 0)
    assert make_vocabulary([first]).find(second) is None


def test_merges() -> None:
    vocabulary = make_vocabulary(TOKENS, MERGES)
    assert vocabulary.merge(0, 1) == (0, 3)
    assert vocabulary.merge(3, 2) == (1, 4)
    assert vocabulary.merge(1, 0) is None
    assert vocabulary.merges() == [("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")]


@pytest.mark.parametrize("merge", ["a x", "x a", "nospace", "b a", "a", " "])
def test_merges_of_and_into_what_is_no_token(merge: str) -> None:
    with pytest.raises(FormatError, match="no token"):
        make_vocabulary(TOKENS, [merge])


def test_a_file_gives_it_back(tmp_path: Path) -> None:
    path = vocabulary_path(tmp_path, "identity")
    assert load_vocabulary(path) is None
    for vocabulary in (make_vocabulary(TOKENS, MERGES), make_vocabulary(["a b"], spaced=True)):
        save_vocabulary(path, vocabulary)
        loaded = load_vocabulary(path)
        assert loaded is not None
        assert same(loaded, vocabulary)
        assert loaded.merge(0, 1) == vocabulary.merge(0, 1)


def test_another_checkpoint_has_another_file(tmp_path: Path) -> None:
    assert vocabulary_path(tmp_path, "a") != vocabulary_path(tmp_path, "b")
    assert vocabulary_path(tmp_path, "a") == vocabulary_path(tmp_path, "a")
    assert LAYOUT_VERSION >= 1


@given(st.data())
@settings(max_examples=300)
def test_damage_is_noticed_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damage") / "x.packed"
    vocabulary = make_vocabulary(TOKENS, MERGES)
    save_vocabulary(path, vocabulary)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    path.write_bytes(content)
    loaded = load_vocabulary(path)
    assert loaded is None or same(loaded, vocabulary)


def test_every_table_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "x.packed"
    vocabulary = make_vocabulary(TOKENS, MERGES)
    save_vocabulary(path, vocabulary)
    whole = path.read_bytes()
    for name, array in vocabulary.arrays.items():
        at = whole.index(array.tobytes())
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert load_vocabulary(path) is None, name


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    save_vocabulary(tmp_path / "file" / "x.packed", make_vocabulary(TOKENS))
