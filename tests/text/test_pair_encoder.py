"""The first texts are encoded from tables, with exactly the ids that ``tokenizers`` gives."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sartor.formats import open_checkpoint
from sartor.text import gguf, pair_encoder
from sartor.text.pair_encoder import PairEncoder
from sartor.text.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from sartor.text.tokenizer import Encoder, tokenizer_from_gguf
from sartor.text.vocabulary import Vocabulary, make_vocabulary

# Merges that compete: of equal characters, of overlapping pairs, of what others have made.
MERGES = ["a a", "b a", "a b", "aa a", "aa b", "ba b", "c c", "cc c", "cc cc", "Ġ a", "Ġa a",
          "Ã ©", "ab ab", "Ġ Ġ", "ĠĠ Ġ", "ĠĠ ĠĠ"]  # fmt: skip
SPECIAL = ["<|s|>", "<|s|>x", "<e>"]
USER = ["<t>", "a<", "aaaa", "   "]


def toy() -> tuple[Vocabulary, dict[str, int], frozenset[int]]:
    from sartor.text.byte_level import byte_alphabet

    # "ab" is a token, "abab" is one by a merge; "cab" is one that no merge makes.
    made = [merge.replace(" ", "") for merge in MERGES]
    tokens = [*byte_alphabet(), *made, "cab", *SPECIAL, *USER]
    tokens = list(dict.fromkeys(tokens))
    vocabulary = make_vocabulary(tokens, MERGES)
    added = {text: tokens.index(text) for text in (*SPECIAL, *USER)}
    return vocabulary, added, frozenset(added[text] for text in SPECIAL)


def encoders(rule: PreTokenizer) -> tuple[PairEncoder, Encoder]:
    vocabulary, added, special = toy()

    def complete() -> Encoder:
        return gguf._complete(vocabulary, rule, added, special)

    def never() -> Encoder:
        raise AssertionError("the tables are enough for this text")

    return PairEncoder(vocabulary, rule, added, special, never, 10**9), complete()


PAIRS = {name: encoders(PRE_TOKENIZERS[name]) for name in ("default", "llama-bpe", "qwen2")}
TEXT = st.lists(
    st.sampled_from([*"aaabbcc  é\u0301xé", *SPECIAL, *USER, "cab", "\n", "漢", "<|s|", "|>"]),
    max_size=40,
).map("".join)


@pytest.mark.parametrize("name", PAIRS)
@given(st.one_of(TEXT, st.text(max_size=60)), st.booleans())
@settings(max_examples=300)
def test_ids_are_the_same(name: str, text: str, parse_special: bool) -> None:
    ours, complete = PAIRS[name]
    assert ours.encode(text, parse_special) == complete.encode(text, parse_special)


def test_a_character_that_is_no_token_is_left_out() -> None:
    vocabulary = make_vocabulary(["a", "b", "ab"], ["a b"])
    rule = PRE_TOKENIZERS["default"]
    complete = gguf._complete(vocabulary, rule, {}, frozenset())
    ours = PairEncoder(vocabulary, rule, {}, frozenset(), lambda: complete)
    assert ours.encode("axb", True) == complete.encode("axb", True)
    assert ours.encode("xyz", True) == []


class Counted:
    """Stands for the encoder of ``tokenizers``."""

    made = 0

    def __init__(self) -> None:
        Counted.made += 1

    def encode(self, text: str, parse_special: bool) -> list[int]:
        return [-1]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> PairEncoder:
    monkeypatch.setattr(Counted, "made", 0)
    vocabulary, added, special = toy()
    rule = PRE_TOKENIZERS["default"]
    return PairEncoder(vocabulary, rule, added, special, Counted, characters=10)


def test_it_gives_way_when_more_text_comes(short: PairEncoder) -> None:
    assert short.encode("aaaaaa", True) != [-1]
    assert Counted.made == 0
    for _ in range(3):
        assert short.encode("aaaaaa", True) == [-1]
    assert short.encode("", True) == [-1]
    assert Counted.made == 1


def test_a_long_word_is_not_for_it() -> None:
    vocabulary, added, special = toy()
    rule = PRE_TOKENIZERS["default"]
    ours = PairEncoder(vocabulary, rule, added, special, Counted)
    assert ours.encode("b" * pair_encoder._LONGEST_WORD, True) != [-1]
    assert ours.encode("b" * (pair_encoder._LONGEST_WORD + 1), True) == [-1]


def test_a_real_vocabulary(
    model_files: dict[str, Path],
    lines: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    metadata = open_checkpoint(model_files["smollm2-135m"]).metadata
    tokenizer = tokenizer_from_gguf(metadata)
    encoder: Any = tokenizer._encoder
    encoder._left = 10**9
    complete = encoder._complete()
    chat = "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"
    for text in (*lines, chat, string.printable, *(chr(c) * 3 for c in range(32, 0x3000, 7))):
        for parse_special in (True, False):
            assert encoder.encode(text, parse_special) == complete.encode(text, parse_special)
