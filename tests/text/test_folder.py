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
    assert (ours.add_bos, ours.add_eos) == (True, True)  # the post-processor has the first
    assert ours.eos_ids == {1, 2, 7}
    assert ours.encode("a", add_special=False) == ours.encode("a")[1:-1]


@pytest.mark.parametrize("written", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("add_bos", ["absent", None, False, True])
@pytest.mark.parametrize("add_eos", ["absent", None, False, True])
@pytest.mark.parametrize("kind", ["byte level", "prefix"])
def test_each_side_is_the_options_or_the_post_processors(
    tmp_path: Path, page: str, kind: str, written: str, add_bos: object, add_eos: object
) -> None:
    from transformers import AutoTokenizer

    backend = byte_level(page) if kind == "byte level" else sentencepiece_like(page, True)
    backend.post_processor = processors.TemplateProcessing(
        single=written, pair=f"{written} $B", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    options = {"add_bos_token": add_bos, "add_eos_token": add_eos}
    config = {k: v for k, v in options.items() if v != "absent"}
    write(tmp_path, backend, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>", **config})
    ours = tokenizer_from_folder(tmp_path)
    ids = ours.encode("Hello world", add_special=False)
    begin = add_bos if isinstance(add_bos, bool) else "<s>" in written
    end = add_eos if isinstance(add_eos, bool) else "</s>" in written
    assert ours.encode("Hello world") == [0] * begin + ids + [1] * end
    if not isinstance(add_bos, bool) and not isinstance(add_eos, bool):
        # With tokenizer.json there, transformers 5 reads neither option.
        oracle = AutoTokenizer.from_pretrained(tmp_path)
        assert ours.encode("Hello world") == oracle.encode("Hello world")


def test_an_option_does_not_take_what_else_the_post_processor_writes(
    tmp_path: Path, page: str
) -> None:
    backend = byte_level(page)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> é! $A", pair="<s> é! $A $B",
        special_tokens=[("<s>", 0), ("é!", backend.token_to_id("é!"))],
    )  # fmt: skip
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    write(tmp_path, backend, tokenizer_config={**names, "add_bos_token": True})
    with_bos = tokenizer_from_folder(tmp_path).encode("a")
    assert with_bos == backend.encode("a").ids
    write(tmp_path, backend, tokenizer_config={**names, "add_bos_token": False})
    assert tokenizer_from_folder(tmp_path).encode("a") == with_bos[1:]


def test_broken_folders(tmp_path: Path, page: str) -> None:
    with pytest.raises(FormatError, match="has no tokenizer"):
        tokenizer_from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(FormatError, match=r"cannot read .*tokenizer\.json"):
        tokenizer_from_folder(tmp_path)
    write(tmp_path, byte_level(page), config={"eos_token_id": [10**6, -1, 1]})
    notes: list[str] = []
    assert tokenizer_from_folder(tmp_path, notes).eos_ids == {1, 2}
    assert len(notes) == 2
    assert "eos_token_id in config.json holds 1000000, but the vocabulary has" in notes[0]
    write(tmp_path, byte_level(page), tokenizer_config=[1], config={})
    with pytest.raises(FormatError, match=r"tokenizer_config\.json must hold a JSON object"):
        tokenizer_from_folder(tmp_path)
    backend = byte_level(page)
    backend.decoder = decoders.CTC()
    write(tmp_path, backend)
    with pytest.raises(UnsupportedError, match="CTC"):
        tokenizer_from_folder(tmp_path)
