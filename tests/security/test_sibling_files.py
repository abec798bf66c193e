"""The small files beside weights: absurdly large, nested or spelled, each is refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from hostile_kinds import KINDS, Kind

from sartor.engine.peft import read_peft
from sartor.errors import FormatError, SartorError
from sartor.formats import open_checkpoint, small_files
from sartor.graph import UNSAID
from sartor.models import own_sampling
from sartor.models.options import Options
from sartor.serving.keys import read_keys
from sartor.text.byte_level import on_texts, readable
from sartor.text.sentencepiece import SentencePieceBPE, Splitter
from sartor.text.template import template_from_folder
from sartor.text.tokenizer import tokenizer_from_folder

NESTED = {
    "a list": b"[" * 100_000,
    "an object": b'{"a":' * 100_000,
    "a closed list": b"[" * 100_000 + b"]" * 100_000,
    "in a value": b'{"rope_scaling": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
}


def _use_folder(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        own_sampling(checkpoint)


def _use_adapter(folder: Path) -> None:
    read_peft(folder, cast(Any, SimpleNamespace()))


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "config.json": ("safetensors", _use_folder),
    "model.safetensors.index.json": ("safetensors", _use_folder),
    "adapter_config.json": ("adapter", _use_adapter),
    "tokenizer.json": ("tokenizer", tokenizer_from_folder),
    "tokenizer_config.json": ("tokenizer", tokenizer_from_folder),
    "special_tokens_map.json": ("tokenizer", tokenizer_from_folder),
    "tokenizer.model": ("sentencepiece", tokenizer_from_folder),
    "chat_template.json": ("tokenizer", template_from_folder),
    "chat_template.jinja": ("tokenizer", template_from_folder),
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    wanted = {kind for kind, _ in READERS.values()}
    return {name: KINDS[name](tmp_path_factory.mktemp(name)) for name in wanted}


def place(folder: Path, kinds: dict[str, Kind], name: str) -> Callable[[Path], object]:
    """A sound folder, for what reads the file of that name."""
    kind, read = READERS[name]
    kinds[kind].write(folder, None)
    if name.endswith("index.json"):
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    if name == "special_tokens_map.json":
        (folder / "tokenizer_config.json").unlink()  # what it says is not looked for elsewhere
    return read


@pytest.mark.parametrize("what", NESTED)
@pytest.mark.parametrize("name", [name for name in READERS if name.endswith(".json")])
def test_deep_nesting_is_refused(
    tmp_path: Path, kinds: dict[str, Kind], name: str, what: str
) -> None:
    read = place(tmp_path, kinds, name)
    (tmp_path / name).write_bytes(NESTED[what])
    with pytest.raises(FormatError, match=name.replace(".", r"\.")):
        read(tmp_path)


@pytest.mark.parametrize("content", [*NESTED.values(), b" " * (65 << 20)])
def test_damaged_sampling_defaults_are_not_used(
    tmp_path: Path, kinds: dict[str, Kind], content: bytes
) -> None:
    kinds["safetensors"].write(tmp_path, None)
    (tmp_path / "generation_config.json").write_bytes(content)
    with open_checkpoint(tmp_path) as checkpoint:
        defaults = own_sampling(checkpoint)
    assert dataclasses.replace(defaults, notes=()) == UNSAID
    assert "generation_config.json" in defaults.notes[0]


@pytest.mark.parametrize("name", READERS)
def test_a_file_of_3_gb_is_not_read(tmp_path: Path, kinds: dict[str, Kind], name: str) -> None:
    read = place(tmp_path, kinds, name)
    with (tmp_path / name).open("wb") as file:
        file.truncate(3 << 30)  # a hole: it takes no room
    with pytest.raises(FormatError, match=rf"{name.replace('.', '[.]')}: larger than 64 MiB"):
        read(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer_config.json")
    with pytest.raises(FormatError, match="not a regular file"):
        small_files.read(tmp_path / "tokenizer_config.json")


def test_half_of_a_surrogate_pair_is_refused(tmp_path: Path, kinds: dict[str, Kind]) -> None:
    assert small_files.parse_json(rb'{"\ud83d\ude00": ["\ud83d\ude00"]}') == {"😀": ["😀"]}
    for raw in (rb'"\ud83d"', rb'{"\ude00": 1}', rb'[{"a": "x\uDE00"}]'):
        with pytest.raises(ValueError, match="half of a surrogate pair"):
            small_files.parse_json(raw)
    read = place(tmp_path, kinds, "tokenizer_config.json")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "\\ud800"}')
    with pytest.raises(FormatError, match=r"tokenizer_config\.json.*surrogate"):
        read(tmp_path)


def test_numbers_that_no_float_holds_are_refused() -> None:
    options = Options({"a": 10**400, "b": [1, 10**400], "w": 1 << 80}, "config.json")
    with pytest.raises(FormatError, match=r"config\.json: a is 1000.*64 bits"):
        options.number("a")
    with pytest.raises(FormatError, match=r"config\.json: b is .*64 bits"):
        options.numbers("b")
    assert options.window("w", 0) == 1 << 40


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
@pytest.mark.parametrize("value", [10**400, 1e300, float("inf"), float("nan")])
def test_an_adapter_of_no_rank_is_refused(tmp_path: Path, key: str, value: float) -> None:
    kind = KINDS["adapter"](tmp_path)
    folder = tmp_path / "case"
    folder.mkdir()
    kind.write(folder, None)
    config = json.loads((folder / "adapter_config.json").read_bytes())
    config |= {key: value, "rank_pattern": {}, "alpha_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=f"{key} of .* must be a positive number below"):
        kind.use(folder)


def test_keys_in_deep_nesting_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text("key = " + "[" * 100_000)
    with pytest.raises(SartorError, match=r"keys\.toml is wrong"):
        read_keys(path)


def test_messages_are_bounded_and_keep_their_end() -> None:
    message = str(FormatError(f"config.json: {'a' * 10_000!r} is wrong; fetch it again"))
    assert len(message) < 2000
    assert message.startswith("config.json: 'aaa")
    assert message.endswith("is wrong; fetch it again")
    assert str(FormatError("short")) == "short"


def test_tokens_that_are_empty_or_there_twice() -> None:
    assert list(Splitter({"": 0, "b": 1}).split("abc")) == [("a", None), ("b", 1), ("c", None)]
    types = _types([2, 3, 3, 1])
    model = SentencePieceBPE(
        ["<unk>", "<s>", "<s>", "a"], [0.0] * 4, types, unknown_id=0, space_prefix=False
    )
    assert model.encode("a", parse_special=False) == [3]


def test_pieces_that_are_made_of_many_others() -> None:
    """Unused pieces of every length: each is taken apart into the one before, and one more."""
    count = 3000
    tokens = ["<unk>", "a", *("a" * n for n in range(2, count))]
    types = _types([2, 1, *[5] * (count - 2)])
    scores = [0.0, 0.0, *(float(n) for n in range(2, count))]
    model = SentencePieceBPE(tokens, scores, types, unknown_id=0, space_prefix=False)
    assert model.encode("a" * (count - 1), parse_special=False) == [1] * (count - 1)


def test_what_the_library_ends_a_process_with_is_an_error() -> None:
    """A damaged map of characters of a SentencePiece model made it panic on a text."""
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(SartorError, match="failed on this text: not a char boundary"), on_texts():
        raise panic("not a char\nboundary")
    with (
        pytest.raises(FormatError, match=r"t\.json: the tokenizer fails"),
        readable(Path("t.json")),
    ):
        raise panic("no entry")
    with pytest.raises(KeyboardInterrupt), on_texts():
        raise KeyboardInterrupt


def _types(values: list[int]) -> npt.NDArray[np.int32]:
    return np.array(values, np.int32)
