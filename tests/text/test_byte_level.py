"""Byte-level BPE: the same ids as the tokenizer that a vocabulary was trained with."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from sartor.errors import CapacityError, FormatError, SartorError, UnsupportedError, UsageError
from sartor.text.byte_level import TokenizersEncoder
from sartor.text.pretokenizers import PRE_TOKENIZERS
from sartor.text.tokenizer import Tokenizer, tokenizer_from_gguf


def split(*patterns: str) -> Any:
    stages: list[Any] = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns]
    return pre_tokenizers.Sequence(
        [*stages, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def reference(name: str) -> tuple[Any, Any]:
    """(normaliser, pre-tokenizer) as the models' own tokenizer.json files have them."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    if name in ("gpt-2", "default"):
        return None, plain
    if name in ("smollm", "starcoder"):
        return None, digits
    if name == "command-r":
        return normalizers.NFC(), digits
    if name == "olmo":
        return normalizers.NFC(), plain
    if name == "deepseek-coder":
        cjk = pre_tokenizers.Split(Regex("[一-龥ࠀ-一가-퟿]+"), "isolated")
        first = [pre_tokenizers.Split(Regex(p), "isolated")
                 for p in ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+")]  # fmt: skip
        numbers = pre_tokenizers.Digits(individual_digits=True)
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return None, pre_tokenizers.Sequence([*first, cjk, numbers, last])
    normalizer = normalizers.NFC() if name in ("qwen2", "qwen35") else None
    return normalizer, split(GGUF_PRE_TOKENIZER_SPLITS[name])


NAMES = ["gpt-2", "default", "smollm", "starcoder", "command-r", "olmo", "llama-bpe", "falcon3",
         "dbrx", "qwen2", "qwen35", "deepseek-r1-qwen", "tekken", "gpt-4o", "llama4",
         "deepseek-coder"]  # fmt: skip

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER = ["<think>", "    "]


def train(name: str, page: str) -> Backend:
    normalizer, pre_tokenizer = reference(name)
    backend = Backend(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([page, page * 2, "1234 5678 12 99 2024 " * 9], trainer)
    backend.add_tokens([AddedToken(t, normalized=False) for t in USER])
    return backend


def to_gguf(backend: Backend, name: str, **more: object) -> dict[str, object]:
    import json

    model = json.loads(backend.to_str())["model"]
    vocab = sorted(backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    kinds = {**dict.fromkeys(SPECIAL, 3), **dict.fromkeys(USER, 4)}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": [token for token, _ in vocab],
        "tokenizer.ggml.token_type": [kinds.get(token, 1) for token, _ in vocab],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


@pytest.fixture(scope="module")
def metadata(page: str) -> dict[str, object]:
    return to_gguf(train("smollm", page), "smollm")


@pytest.fixture(scope="module")
def tokenizer(metadata: dict[str, object]) -> Tokenizer:
    return tokenizer_from_gguf(metadata)


@pytest.mark.parametrize("name", NAMES)
def test_ids_equal_the_tokenizer_it_was_trained_with(
    name: str, page: str, lines: tuple[str, ...]
) -> None:
    oracle = train(name, page)
    # ignore_merges is part of these models, not of the training.
    oracle.model.ignore_merges = name in ("llama-bpe", "falcon3", "tekken")
    ours = tokenizer_from_gguf(to_gguf(oracle, name))
    for line in (*lines, "<|im_start|>user\nhi <think>  x<|im_end|>\n", "a      b"):
        ids = oracle.encode(line, add_special_tokens=False).ids
        assert ours.encode(line) == ids
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special=False) == oracle.decode(ids, skip_special_tokens=False)


def test_deepseek_v3_words(page: str) -> None:
    pre = PRE_TOKENIZERS["deepseek-v3"].build()
    words = [word for word, _ in pre.pre_tokenize_str("Hi there, 12345 漢字かな! (x)\n")]
    assert words == ["Hi", "Ġthere", ",", "Ġ", "123", "45", "Ġ", "æ¼¢åŃĹãģĭãģª", "!", "Ġ(", "x",
                     ")Ċ"]  # fmt: skip


def test_every_rule_builds_and_loses_nothing(page: str) -> None:
    for rule in PRE_TOKENIZERS.values():
        words = rule.build().pre_tokenize_str(page)
        assert words[0][1][0] == 0
        assert words[-1][1][1] == len(page)


@given(st.text(max_size=80))
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_special_tokens_in_the_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<|im_end|>") == [2]
    plain = tokenizer.encode("<|im_end|>", parse_special=False)
    assert 2 not in plain
    assert tokenizer.decode(plain) == "<|im_end|>"
    assert tokenizer.encode("<|im_end|>") == [2]
    think = tokenizer.encode("<think>", parse_special=False)
    assert len(think) == 1  # user-defined tokens are text
    assert tokenizer.token_bytes(think[0]) == b"<think>"
    assert tokenizer.token_bytes(2) == b""
    assert tokenizer.token_text(2) == "<|im_end|>"
    assert tokenizer.special_ids == {0, 1, 2}


def test_end_of_generation_ids(tokenizer: Tokenizer, metadata: dict[str, object]) -> None:
    assert tokenizer.eos_ids == {0, 2}  # <|endoftext|> by its name, <|im_end|> as declared
    more = tokenizer_from_gguf({**metadata, "tokenizer.ggml.eot_token_id": 5})
    assert more.eos_ids == {0, 2, 5}


def test_bos_and_eos_are_added_as_declared(metadata: dict[str, object]) -> None:
    changed = {
        **metadata,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
    }
    both = tokenizer_from_gguf(changed)
    assert (both.add_bos, both.add_eos) == (True, True)
    bare = both.encode("hi", add_special=False)
    assert both.encode("hi") == [1, *bare, 2]
    del changed["tokenizer.ggml.add_bos_token"]
    assert not tokenizer_from_gguf(changed).add_bos
    assert tokenizer_from_gguf({**changed, "tokenizer.ggml.pre": "llama-bpe"}).add_bos


def test_padding_ids_stand_for_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""
    assert tokenizer.decode([tokenizer.vocab_size + 5, -1]) == ""


def test_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match=r"U\+D83D at character 3"):
        tokenizer.encode("abc\ud83d")


def test_long_runs_do_not_hang(tokenizer: Tokenizer) -> None:
    for text in ("a" * 200_000, " " * 200_000, "\n" * 100_000, "1" * 50_000, "é" * 50_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": None}, FormatError, "tokenizer.ggml.model is missing"),
        ({"model": 3}, FormatError, "tokenizer.ggml.model must be a string"),
        ({"model": "gemma4"}, UnsupportedError, "'gemma4'.*supported: bert, gpt2, llama"),
        ({"pre": "klingon"}, UnsupportedError, "'klingon'.*smollm"),
        ({"tokens": None}, FormatError, "tokenizer.ggml.tokens is missing"),
        ({"tokens": []}, FormatError, "tokenizer.ggml.tokens is empty"),
        ({"tokens": [1, 2]}, FormatError, "tokenizer.ggml.tokens must be an array of strings"),
        ({"tokens": ["a", "b", "a"]}, FormatError, "'a' twice, again at id 2"),
        ({"token_type": [1, 1]}, FormatError, "tokenizer.ggml.token_type has 2 entries"),
        ({"token_type": "x"}, FormatError, "tokenizer.ggml.token_type must be"),
        ({"merges": None}, FormatError, "tokenizer.ggml.merges is missing"),
        ({"merges": ["zz qq"]}, FormatError, "tokenizer.ggml.merges does not fit"),
        ({"merges": ["nospace"]}, FormatError, "tokenizer.ggml.merges does not fit"),
        ({"add_bos_token": True, "bos_token_id": 10**6}, FormatError, "bos_token_id is missing"),
        ({"eos_token_id": "2"}, FormatError, "tokenizer.ggml.eos_token_id must be a token id"),
        ({"add_bos_token": "yes"}, FormatError, "tokenizer.ggml.add_bos_token must be a boolean"),
        ({"add_bos_token": True, "bos_token_id": None}, FormatError, "bos_token_id is missing"),
    ],
)
def test_damaged_metadata_is_named(
    metadata: dict[str, object], change: dict[str, object], error: type[Exception], message: str
) -> None:
    changed = {**metadata, **{f"tokenizer.ggml.{k}": v for k, v in change.items()}}
    changed = {k: v for k, v in changed.items() if v is not None}
    with pytest.raises(error, match=message):
        tokenizer_from_gguf(changed)


class PanicException(BaseException):
    """As the library's own, which cannot be imported."""


@pytest.mark.parametrize(
    ("reason", "kind", "said"),
    [
        ("The global thread pool has not been initialized", CapacityError, "cannot be started"),
        ("index out of\nbounds", SartorError, "failed on this text: index out of bounds"),
    ],
)
def test_a_panic_of_the_library_is_an_error(
    reason: str, kind: type[SartorError], said: str
) -> None:
    class Failing:
        encode_special_tokens = False

        def encode_batch_fast(self, *_: object, **__: object) -> None:
            raise PanicException(reason)

    encoder = TokenizersEncoder(Failing())
    for _ in range(2):  # the lock is free again
        with pytest.raises(kind, match=said):
            encoder.encode("x", parse_special=True)


def test_an_interrupt_stays_one() -> None:
    class Interrupted:
        encode_special_tokens = False

        def encode_batch_fast(self, *_: object, **__: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TokenizersEncoder(Interrupted()).encode("x", parse_special=True)
