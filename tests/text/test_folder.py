"""Checkpoint folders in the Hugging Face layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend

from sartor.errors import FormatError, UnsupportedError
from sartor.text.detokenizer import Detokenizer
from sartor.text.tokenizer import tokenizer_from_folder

SPECIAL = ["<s>", "</s>", "<|im_end|>"]


def byte_level(page: str) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, show_progress=False, special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator([page], trainer)
    backend.add_tokens([AddedToken("é!", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return backend


def sentencepiece_like(page: str, prefix: bool) -> Backend:
    alphabet = sorted(set(page.replace(" ", "\u2581")))[:150]
    vocab = {
        t: i for i, t in enumerate([*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *alphabet])
    }
    backend = Backend(models.BPE(vocab, [], byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "\u2581")
    stages: list[Any] = [
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
    ]  # fmt: skip
    if prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace])
        stages.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = replace
    backend.decoder = decoders.Sequence(stages)
    backend.add_special_tokens(SPECIAL)
    return backend


def write(folder: Path, backend: Backend, **files: object) -> None:
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    for name, content in {"tokenizer_config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("kind", ["byte level", "prefix", "no prefix"])
def test_equals_the_library(tmp_path: Path, page: str, lines: tuple[str, ...], kind: str) -> None:
    oracle = (
        byte_level(page) if kind == "byte level" else sentencepiece_like(page, kind == "prefix")
    )
    write(tmp_path, oracle)
    ours = tokenizer_from_folder(tmp_path)
    for line in (*lines, "x<s>y é!"):
        ids = oracle.encode(line).ids
        assert ours.encode(line) == ids
        for skip in (True, False):
            expected = oracle.decode(ids, skip_special_tokens=skip)
            if kind == "byte level" and "é!" in line:
                # Its decoder takes the added token for two bytes of the alphabet.
                expected = line if skip else "<s>" + line
                expected = expected.replace("x<s>", "x" if skip else "x<s>")
            assert ours.decode(ids, skip_special=skip) == expected
            stream = Detokenizer(ours, skip_special=skip)
            assert "".join(map(stream.push, ids)) + stream.finish() == expected
    assert (ours.bos_id, ours.eos_ids) == (0, frozenset({1, 2}))
    assert ours.special_ids == {0, 1, 2}
    assert ours.add_bos == (kind == "byte level")


def test_configuration_over_post_processor(tmp_path: Path, page: str) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_eos_token": True}
    write(
        tmp_path, byte_level(page), tokenizer_config=config,
        generation_config={"eos_token_id": [1, 7]},
    )  # fmt: skip
    ours = tokenizer_from_folder(tmp_path)
    assert (ours.add_bos, ours.add_eos) == (False, True)
    assert ours.eos_ids == {1, 2, 7}
    assert ours.encode("a", add_special=False) == ours.encode("a")[:-1]


def test_broken_folders(tmp_path: Path, page: str) -> None:
    with pytest.raises(FormatError, match="has no tokenizer"):
        tokenizer_from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(FormatError, match=r"cannot read .*tokenizer\.json"):
        tokenizer_from_folder(tmp_path)
    write(tmp_path, byte_level(page), config={"eos_token_id": 10**6})
    with pytest.raises(FormatError, match=r"eos_token_id in .*config\.json holds 1000000"):
        tokenizer_from_folder(tmp_path)
    write(tmp_path, byte_level(page), tokenizer_config=[1], config={})
    with pytest.raises(FormatError, match=r"tokenizer_config\.json must hold a JSON object"):
        tokenizer_from_folder(tmp_path)
    backend = byte_level(page)
    backend.decoder = decoders.CTC()
    write(tmp_path, backend)
    with pytest.raises(UnsupportedError, match="CTC"):
        tokenizer_from_folder(tmp_path)
