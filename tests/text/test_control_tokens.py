"""Control tokens that a GGUF marks wrongly, and ids that name no token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_byte_level import to_gguf as byte_level_gguf
from test_byte_level import train as train_byte_level
from test_sentencepiece import to_gguf as pieces_gguf
from test_sentencepiece import train as train_pieces

from sartor.errors import FormatError
from sartor.text.template import template_from_gguf
from sartor.text.tokenizer import tokenizer_from_gguf

CHAT = "<|im_start|>user\nhi<|im_end|>\n"


@pytest.fixture(scope="module")
def byte_level(page: str) -> dict[str, object]:
    return byte_level_gguf(train_byte_level("smollm", page), "smollm")


@pytest.fixture(scope="module")
def pieces(page: str) -> dict[str, object]:
    import sentencepiece as spm

    symbols = ["<|im_start|>", "<|im_end|>", "<end_of_turn>", "<|fim_prefix|>"]
    data = train_pieces(page, control_symbols=symbols)
    return pieces_gguf(spm.SentencePieceProcessor(model_proto=data))


def with_type(metadata: dict[str, Any], kind: int, *tokens: str) -> dict[str, object]:
    types = list(metadata["tokenizer.ggml.token_type"])
    for token in tokens:
        types[metadata["tokenizer.ggml.tokens"].index(token)] = kind
    return {**metadata, "tokenizer.ggml.token_type": np.asarray(types)}


@pytest.mark.parametrize("kind", [0, 1, 2, 4, 5, 6])
@pytest.mark.parametrize("model", ["byte_level", "pieces"])
def test_known_control_tokens_of_any_type(
    model: str, kind: int, request: pytest.FixtureRequest
) -> None:
    metadata = request.getfixturevalue(model)
    right = tokenizer_from_gguf(metadata)
    ours = tokenizer_from_gguf(with_type(metadata, kind, "<|im_start|>", "<|im_end|>"))
    assert ours.encode(CHAT) == right.encode(CHAT)
    assert ours.encode(CHAT, parse_special=False) == right.encode(CHAT, parse_special=False)
    assert ours.eos_ids == right.eos_ids
    assert ours.special_ids >= right.special_ids
    for token in ("<|im_start|>", "<|im_end|>"):
        (i,) = right.encode(token, add_special=False)
        assert ours.token_bytes(i) == b""


def test_every_end_of_turn_is_known_by_its_name(pieces: dict[str, object]) -> None:
    for kind in (1, 3, 4, 5):
        ours = tokenizer_from_gguf(with_type(pieces, kind, "<end_of_turn>", "<|im_end|>"))
        assert len(ours.eos_ids) == 3  # with the declared one


def test_no_types_at_all(byte_level: dict[str, object]) -> None:
    metadata = {k: v for k, v in byte_level.items() if k != "tokenizer.ggml.token_type"}
    ours = tokenizer_from_gguf(metadata)
    assert ours.encode(CHAT) == tokenizer_from_gguf(byte_level).encode(CHAT)
    assert ours.special_ids == {0, 1, 2}


def test_other_control_tokens_by_their_shape(pieces: dict[str, object]) -> None:
    right = tokenizer_from_gguf(pieces)
    ours = tokenizer_from_gguf(with_type(pieces, 1, "<|fim_prefix|>"))
    assert ours.encode("<|fim_prefix|>x") == right.encode("<|fim_prefix|>x")
    # What a file marks as text that is always whole stays text.
    user = tokenizer_from_gguf(with_type(pieces, 4, "<|fim_prefix|>"))
    (i,) = user.encode("<|fim_prefix|>", add_special=False, parse_special=False)[-1:]
    assert user.token_bytes(i) == b"<|fim_prefix|>"


def test_words_are_no_control_tokens(page: str) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, special_tokens=["<|endoftext|>", "<s>", "<e>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(["<EOT>", "<|x|>"] * 500, trainer)
    metadata = byte_level_gguf(backend, "smollm")
    for word in ("<EOT>", "<|x|>"):
        (i,) = backend.encode(word).ids  # a merge makes it
        ours = tokenizer_from_gguf(metadata)
        assert i not in ours.special_ids | ours.eos_ids
        assert ours.token_bytes(i) == word.encode()


def test_html_is_not_the_end(pieces: dict[str, Any]) -> None:
    """Gemma has </s> as the end of strikethrough."""
    tokens = list(pieces["tokenizer.ggml.tokens"])
    (
        tokens[2],
        tokens[10],
    ) = "<eos>", "</s>"
    types = np.array(pieces["tokenizer.ggml.token_type"])
    types[10] = 4
    changed = {**pieces, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    ours = tokenizer_from_gguf(changed)
    assert 10 not in ours.eos_ids | ours.special_ids


def test_repairs_are_said(byte_level: dict[str, object]) -> None:
    notes: list[str] = []
    tokenizer_from_gguf(with_type(byte_level, 1, "<|im_end|>"), notes)
    assert notes == [
        "tokenizer.ggml.token_type marks '<|im_end|>' as plain text; read as control tokens"
    ]
    notes.clear()
    tokenizer_from_gguf(byte_level, notes)
    assert notes == []


@pytest.mark.parametrize("value", [4294967295, -1, 10**6, np.uint32(4294967295)])
@pytest.mark.parametrize(
    "key", ["padding", "unknown", "bos", "eos", "eot", "eom", "mask", "seperator", "cls"]
)
@pytest.mark.parametrize("model", ["byte_level", "pieces"])
def test_ids_out_of_range_are_notes(
    model: str, key: str, value: int, request: pytest.FixtureRequest
) -> None:
    metadata = dict(request.getfixturevalue(model))
    metadata[f"tokenizer.ggml.{key}_token_id"] = value
    metadata["tokenizer.chat_template"] = "{{ bos_token }}{{ messages[0].content }}{{ pad_token }}"
    notes: list[str] = []
    ours = tokenizer_from_gguf(metadata, notes)
    template = template_from_gguf(metadata, notes)
    assert template is not None
    begin = metadata["tokenizer.ggml.tokens"][1]
    if key == "bos" and model == "byte_level":
        begin = ""  # no token there has a usual name
    assert template.render([{"role": "user", "content": "hi"}]) == begin + "hi"
    right = tokenizer_from_gguf(request.getfixturevalue(model))
    assert ours.encode("hi there") == right.encode("hi there")
    assert ours.eos_ids, "another token ends answers"
    if key in ("padding", "unknown", "bos", "eos", "eot", "eom"):
        assert notes[0].startswith(f"tokenizer.ggml.{key}_token_id is {value}, but the voc")


@pytest.mark.parametrize("bos", [None, 10**6, 4294967295])
def test_the_template_begins_as_the_tokenizer_does(pieces: dict[str, Any], bos: object) -> None:
    """Also where the beginning is not token 1, as in Gemma."""
    tokens = list(pieces["tokenizer.ggml.tokens"])
    tokens[1], tokens[2] = "<eos>", "<bos>"
    metadata = {**pieces, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.bos_token_id": bos}
    metadata = {k: v for k, v in metadata.items() if v is not None}
    metadata["tokenizer.chat_template"] = "{{ bos_token }}{{ messages[0].content }}"
    template = template_from_gguf(metadata)
    assert template is not None
    assert template.render([{"role": "user", "content": "hi"}]) == "<bos>hi"
    assert tokenizer_from_gguf(metadata).encode("hi")[0] == 2


def test_what_an_answer_needs_is_still_an_error(byte_level: dict[str, object]) -> None:
    wrong = {"tokenizer.ggml.eos_token_id": 10**6, "tokenizer.ggml.add_eos_token": True}
    with pytest.raises(FormatError, match=r"add_eos_token is set, but .*eos_token_id is missing"):
        tokenizer_from_gguf({**byte_level, **wrong})


def test_without_any_end_it_says_so(byte_level: dict[str, Any]) -> None:
    tokens = [t.replace("<|", "<!") for t in byte_level["tokenizer.ggml.tokens"]]
    notes: list[str] = []
    metadata = {**byte_level, "tokenizer.ggml.eos_token_id": 10**6}
    metadata["tokenizer.ggml.tokens"] = tokens
    metadata["tokenizer.ggml.merges"] = []
    assert not tokenizer_from_gguf(metadata, notes).eos_ids
    assert notes[-1].startswith("no token is known that ends an answer")
