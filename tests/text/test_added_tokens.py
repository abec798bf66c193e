"""Tokens added to a vocabulary by the files beside it: the same ids as transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_folder import byte_level
from test_sentencepiece import train
from transformers import AutoTokenizer

from sartor.errors import FormatError
from sartor.text.tokenizer import Tokenizer, tokenizer_from_folder


def token(content: str, **options: bool) -> dict[str, Any]:
    plain = {"special": True, "normalized": False, "lstrip": False, "rstrip": False}
    return {"content": content, **plain, "single_word": False, **options}


DECODER = {
    "0": token("<unk>"),
    "1": token("<s>"),
    "2": token("</s>"),
    "900": token("<|im_start|>"),
    "901": token("<|im_end|>", rstrip=True),
    "902": token("<think>", special=False, normalized=True, lstrip=True),
    "903": token("word", special=False, single_word=True),
}
ADDED = {"<|im_start|>": 900, "<|im_end|>": 901, "<think>": 902}
SPECIAL = ["<|im_start|>", "<|im_end|>"]
CHATS = (
    "<|im_start|>user\nhi<|im_end|>\n  the <think> x word wordy",
    " the the",
    "a word. sword word_",
    "<s>hi</s>  yo<unk>x",
    "<|im_end|>   <think>  a\u00a0<think>\u3000<|im_end|>\u2003b",
    "  <think>the",
    "<|im_start|><|im_start|> <|im_end|> ",
)
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.fixture(scope="module")
def model(page: str) -> bytes:
    return train(page)


def write(folder: Path, **files: object) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def agree(folder: Path, lines: tuple[str, ...]) -> Tokenizer:
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = tokenizer_from_folder(folder)
    for line in (*CHATS, *lines):
        expected = theirs.encode(line, add_special_tokens=False)
        assert ours.encode(line, add_special=False) == expected, line
    return ours


@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("kind", ["LlamaTokenizer", "CodeLlamaTokenizer", None])
@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"added_tokens_decoder": DECODER}},
        {"tokenizer_config": {"additional_special_tokens": SPECIAL}, "added_tokens": ADDED},
        {"added_tokens": ADDED},
        {"tokenizer_config": {"add_prefix_space": False}},
        {},
    ],
)
def test_beside_a_sentencepiece_model(
    tmp_path: Path,
    model: bytes,
    lines: tuple[str, ...],
    files: dict[str, Any],
    kind: str | None,
    legacy: bool | None,
) -> None:
    options = {"tokenizer_class": kind, "legacy": legacy}
    config = {**files.get("tokenizer_config", {}), **NAMES}
    config |= {key: value for key, value in options.items() if value is not None}
    (tmp_path / "tokenizer.model").write_bytes(model)
    write(tmp_path, **{**files, "tokenizer_config": config})
    ours = agree(tmp_path, lines)
    if "added_tokens" in files or "added_tokens_decoder" in config:
        assert ours.encode("<|im_start|>", add_special=False) == [900]
        assert ours.eos_ids == {2, 901}
        assert ours.token_text(900) == "<|im_start|>"
        assert ours.token_bytes(901) == b""
        assert ours.token_bytes(902) == b"<think>"
        assert ours.vocab_size > 902


def test_special_tokens_are_text_where_they_shall_be(tmp_path: Path, model: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model)
    write(tmp_path, tokenizer_config={"added_tokens_decoder": DECODER})
    ours = tokenizer_from_folder(tmp_path)
    ids = ours.encode("<|im_start|> <think>", parse_special=False)
    assert 900 not in ids
    assert 902 in ids
    assert ours.decode(ids) == "<|im_start|><think>"  # the space belongs to the token


def test_a_piece_that_is_renamed(tmp_path: Path, model: bytes) -> None:
    """Models keep unused pieces for this."""
    (tmp_path / "tokenizer.model").write_bytes(model)
    write(tmp_path, tokenizer_config={"added_tokens_decoder": {"300": token("<|im_end|>")}})
    ours = tokenizer_from_folder(tmp_path)
    assert ours.encode("<|im_end|>", add_special=False) == [300]
    assert ours.token_text(300) == "<|im_end|>"
    assert 300 in ours.eos_ids


def test_tokens_without_an_id_are_said(tmp_path: Path, model: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model)
    write(tmp_path, special_tokens_map={"additional_special_tokens": ["<|im_start|>"]})
    notes: list[str] = []
    tokenizer_from_folder(tmp_path, notes)
    assert notes == ["no file gives the special token '<|im_start|>' an id; it is read as text"]
    agree(tmp_path, ())


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"added_tokens_decoder": DECODER}},
        {
            "tokenizer_config": {
                "added_tokens_decoder": {
                    "2": token("<|im_end|>", rstrip=True),
                    "501": token("<|new|>", lstrip=True),
                    "502": token("<think>", special=False),
                }
            }
        },
        {"added_tokens": {"<|new|>": 501, "<think>": 502}},
        {"special_tokens_map": {"eos_token": token("</s>", rstrip=True)}},
        {"tokenizer_config": {"eos_token": "o"}},
    ],
)
def test_beside_a_tokenizer_json(
    tmp_path: Path, page: str, lines: tuple[str, ...], files: dict[str, Any]
) -> None:
    byte_level(page).save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", **files.get("tokenizer_config", {})}
    write(tmp_path, **{**files, "tokenizer_config": config})
    agree(tmp_path, (*lines, "a <|new|> b <think> the x", "é! </s>  x"))


def test_an_end_of_turn_that_is_not_marked(tmp_path: Path, page: str) -> None:
    backend = byte_level(page)
    backend.add_tokens(["<|eot_id|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    ours = tokenizer_from_folder(tmp_path)
    (end,) = ours.encode("<|eot_id|>", add_special=False)
    assert end in ours.eos_ids
    assert ours.token_bytes(end) == b""


@pytest.mark.parametrize(
    "decoder", [[1], {"x": token("a")}, {"-1": token("a")}, {"7": {}}, {"7": token("")}, {"7": 1}]
)
def test_damaged_entries_are_named(tmp_path: Path, model: bytes, decoder: object) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model)
    write(tmp_path, tokenizer_config={"added_tokens_decoder": decoder})
    with pytest.raises(FormatError, match=r"added.token"):
        tokenizer_from_folder(tmp_path)
