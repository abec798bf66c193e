"""Streams: what is pushed out never has to be taken back, and adds up to the decoded whole."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sartor.errors import UsageError
from sartor.text.detokenizer import Detokenizer
from sartor.text.tokenizer import Tokenizer, tokenizer_from_gguf

WORDS = ["\u2581", "\u2581hello", "\u2581world", "a", "b", "ab", "\u2581\u2581", "é", "<end>", "漢"]


def tokenizer(space_prefix: bool = True) -> Tokenizer:
    """Three control tokens, 256 byte tokens, a few words: every byte sequence can be spelled."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *WORDS]
    return tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(WORDS))],
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(WORDS),
            "tokenizer.ggml.add_space_prefix": space_prefix,
        }
    )


LLAMA, GEMMA = tokenizer(True), tokenizer(False)
IDS = st.lists(st.integers(0, LLAMA.vocab_size + 1) | st.integers(259, LLAMA.vocab_size - 1))


def spell(text: str) -> list[int]:
    """One token a byte: the hardest cut of all."""
    return [3 + b for b in text.encode()]


def run(detokenizer: Detokenizer, ids: list[int]) -> str:
    out = "".join(detokenizer.push(i) for i in ids) + detokenizer.finish()
    assert detokenizer.text == out
    return out


@given(IDS, st.booleans(), st.booleans())
@settings(max_examples=400, deadline=None)
def test_pushes_add_up_to_decode(ids: list[int], prefix: bool, skip: bool) -> None:
    chosen = LLAMA if prefix else GEMMA
    whole = chosen.decode(ids, skip_special=skip)
    assert run(Detokenizer(chosen, skip_special=skip), ids) == whole


@given(st.text(max_size=30))
@settings(deadline=None)
def test_no_character_is_ever_split(text: str) -> None:
    detokenizer = Detokenizer(GEMMA)
    pushed = [detokenizer.push(i) for i in spell(text)]
    assert "".join(pushed) == text
    assert all(len(p) <= 1 for p in pushed)
    assert detokenizer.finish() == ""


def test_invalid_bytes_become_replacement_characters() -> None:
    emoji = spell("😀")
    assert run(Detokenizer(GEMMA), [*emoji[:3], *spell("x")]) == "\ufffdx"
    assert run(Detokenizer(GEMMA), emoji[:2]) == "\ufffd"
    assert run(Detokenizer(GEMMA), [3 + 0x80, 3 + 0xFF]) == "\ufffd\ufffd"


@given(IDS, st.lists(st.text("ab h<\ufffd", min_size=1, max_size=4), max_size=3))
@settings(max_examples=400, deadline=None)
def test_stop_strings(ids: list[int], stop: list[str]) -> None:
    whole = GEMMA.decode(ids)
    hits = sorted((whole.find(s) + len(s), whole.find(s)) for s in stop if s in whole)
    expected = whole[: hits[0][1]] if hits else whole
    detokenizer = Detokenizer(GEMMA, stop=stop)
    assert run(detokenizer, ids) == expected
    assert (detokenizer.stopped_by is not None) == bool(hits)


def test_stop_does_not_depend_on_the_cut() -> None:
    for ids in (GEMMA.encode("xabcab", add_special=False), spell("xabcab")):
        detokenizer = Detokenizer(GEMMA, stop=["abcab", "ca", "b"])
        assert run(detokenizer, ids) == "xa"
        assert detokenizer.stopped_by == "b"


def test_text_that_may_become_a_stop_waits() -> None:
    detokenizer = Detokenizer(GEMMA, stop=["<end>", "\n\n"])
    pushed = [detokenizer.push(i) for i in spell("ab<en<end")]
    assert "".join(pushed) == "ab<en"
    assert detokenizer.push(spell(">")[0]) == ""
    assert detokenizer.stopped_by == "<end>"
    assert detokenizer.push(spell("x")[0]) == detokenizer.finish() == ""
    assert detokenizer.text == "ab<en"


def test_finish_releases_what_waited() -> None:
    assert run(Detokenizer(GEMMA, stop=["<end>"]), spell("ab<en")) == "ab<en"


def test_leading_space() -> None:
    hello = LLAMA.encode("hello world", add_special=False)
    assert run(Detokenizer(LLAMA), hello) == "hello world"
    assert run(Detokenizer(LLAMA, prompt_ids=[1]), hello) == "hello world"
    assert run(Detokenizer(LLAMA, prompt_ids=[1, *hello]), hello) == " hello world"
    assert run(Detokenizer(GEMMA), hello) == " hello world"


def test_a_character_that_the_prompt_left_open_is_completed() -> None:
    emoji = spell("😀")
    for cut in (1, 2, 3):
        detokenizer = Detokenizer(GEMMA, prompt_ids=[*spell("é漢"), *emoji[:cut]])
        assert run(detokenizer, emoji[cut:]) == "😀"
    assert run(Detokenizer(GEMMA, prompt_ids=spell("😀")), emoji) == "😀"
    assert run(Detokenizer(LLAMA, prompt_ids=[3 + 0x80] * 9), spell("x")) == "x"


def test_special_tokens_are_shown_on_request() -> None:
    ids = [1, *LLAMA.encode("hello", add_special=False), 2]
    assert run(Detokenizer(LLAMA), ids) == "hello"
    assert run(Detokenizer(LLAMA, skip_special=False), ids) == "<s> hello</s>"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="stop string is empty"):
        Detokenizer(GEMMA, stop=["x", ""])


def test_cost_a_token_does_not_grow_with_the_stream() -> None:
    """Far from the 15 us that a push may cost; a quadratic stream would take seconds."""
    ids = GEMMA.encode("hello world ab " * 4000, add_special=False)
    detokenizer = Detokenizer(GEMMA, stop=["<end>", "\n\nUser:", "hello hello"])
    start = time.perf_counter()
    for i in ids:
        detokenizer.push(i)
    assert (time.perf_counter() - start) / len(ids) < 60e-6
