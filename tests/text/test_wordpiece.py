"""WordPiece, as encoders of the BERT family have it: folders and GGUF metadata."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from sartor.errors import FormatError
from sartor.text.tokenizer import tokenizer_from_folder, tokenizer_from_gguf

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def oracle(page: str) -> Backend:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, show_progress=False, special_tokens=SPECIAL, continuing_subword_prefix="##"
    )
    backend.train_from_iterator([page, "an [ and a ] and [x"], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return backend


def _metadata(oracle: Backend) -> dict[str, object]:
    """What llama.cpp's converter writes: the first piece of a word is marked."""
    tokens = []
    for i in range(oracle.get_vocab_size()):
        token = oracle.id_to_token(i)
        if token in SPECIAL:
            tokens.append(token)
        else:
            tokens.append(token[2:] if token.startswith("##") else "\u2581" + token)
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in SPECIAL else 1 for t in tokens],
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.bos_token_id": 2,
    }


def test_folder_equals_the_library(oracle: Backend, tmp_path: Path, lines: tuple[str, ...]) -> None:
    oracle.save(str(tmp_path / "tokenizer.json"))
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "do_lower_case": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    ours = tokenizer_from_folder(tmp_path)
    for line in lines:
        ids = oracle.encode(line).ids
        assert ours.encode(line) == ids
        assert (ids[0], ids[-1]) == (2, 3)
        assert ours.decode(ids) == oracle.decode(ids)
    assert ours.special_ids == set(range(5))


def test_gguf_equals_the_library(oracle: Backend, lines: tuple[str, ...]) -> None:
    ours = tokenizer_from_gguf(_metadata(oracle))
    for line in (*lines, "a [MASK] b"):
        ids = oracle.encode(line).ids
        assert ours.encode(line) == ids
        assert ours.encode(line, add_special=False) == ids[1:-1]
        assert ours.decode(ids) == oracle.decode(ids)
    assert ours.vocab_size == oracle.get_vocab_size()


def test_gguf_without_control_tokens(oracle: Backend) -> None:
    metadata = _metadata(oracle)
    for key in ("unknown_token_id", "seperator_token_id", "bos_token_id", "token_type"):
        del metadata[f"tokenizer.ggml.{key}"]
    assert tokenizer_from_gguf(metadata).encode("a")[0] == 2  # found by its name
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    metadata["tokenizer.ggml.tokens"] = tokens[5:]
    with pytest.raises(FormatError, match=r"no \[CLS\], \[SEP\] or \[UNK\]"):
        tokenizer_from_gguf(metadata)
    metadata["tokenizer.ggml.tokens"] = [*tokens, tokens[-1]]
    with pytest.raises(FormatError, match="twice"):
        tokenizer_from_gguf(metadata)


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("said", [True, False])
def test_capital_letters(page: str, lines: tuple[str, ...], lowercase: bool, said: bool) -> None:
    """Files of before the key do not say it; a vocabulary with capital letters needs them."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=500, show_progress=False, special_tokens=SPECIAL, continuing_subword_prefix="##"
    )
    backend.train_from_iterator([page], trainer)
    metadata = _metadata(backend)
    if said:
        metadata["tokenizer.ggml.normalizer.lowercase"] = lowercase
    ours = tokenizer_from_gguf(metadata)
    for line in lines:
        assert ours.encode(line, add_special=False) == backend.encode(line).ids


def test_accents_apart_from_capital_letters(page: str) -> None:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=500, show_progress=False, special_tokens=SPECIAL, continuing_subword_prefix="##"
    )
    backend.train_from_iterator([page], trainer)
    metadata = {**_metadata(backend), "tokenizer.ggml.normalizer.strip_accents": False}
    ours = tokenizer_from_gguf(metadata)
    assert ours.encode(page, add_special=False) == backend.encode(page).ids
