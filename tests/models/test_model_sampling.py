"""What checkpoints say of sampling is taken where it can be, and costs a note where it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sartor.formats import Checkpoint
from sartor.graph import SamplingDefaults
from sartor.models import own_sampling


def of_folder(folder: Path, content: object) -> SamplingDefaults:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    return own_sampling(cast(Checkpoint, SimpleNamespace(kind="safetensors", path=folder)))


def of_gguf(**values: object) -> SamplingDefaults:
    metadata = {f"general.sampling.{name}": value for name, value in values.items()}
    return own_sampling(cast(Checkpoint, SimpleNamespace(kind="gguf", metadata=metadata)))


def test_a_folder_without_the_file_says_nothing(tmp_path: Path) -> None:
    found = own_sampling(cast(Checkpoint, SimpleNamespace(kind="safetensors", path=tmp_path)))
    assert (found.said(), found.notes) == ({}, ())
    assert of_gguf() == SamplingDefaults()


def test_every_value_is_taken(tmp_path: Path) -> None:
    values = {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.05,
    }
    more = {"do_sample": True, "max_new_tokens": 2048, "max_length": 20, "eos_token_id": [1, 2]}
    found = of_folder(tmp_path, values | more)
    assert found.said() == values
    assert (found.origin, found.notes) == ("generation_config.json", ())
    gguf = of_gguf(temp=0.6, top_p=0.9, top_k=20, min_p=0.05, penalty_repeat=1.05)
    assert (gguf.said(), gguf.notes) == (values, ())
    assert gguf.origin


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"do_sample": False}, {"temperature": 0}),
        ({"do_sample": False, "temperature": 0.9, "top_p": 0.5}, {"temperature": 0, "top_p": 0.5}),
        ({"do_sample": None, "temperature": None, "top_k": None}, {}),
        ({"temperature": 1}, {"temperature": 1}),
        ({"top_k": 50.0}, {"top_k": 50}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"eos_token_id": 2}, {}),
        ({"num_beams": 1, "typical_p": 1.0, "bad_words_ids": [], "no_repeat_ngram_size": 0}, {}),
    ],
)
def test_what_files_say(tmp_path: Path, content: object, expected: dict[str, float]) -> None:
    found = of_folder(tmp_path, content)
    assert (found.said(), found.notes) == (expected, ())


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": "0.7"}, "temperature is '0.7'"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": [0.7]}, "temperature is [0.7]"),
        ('{"temperature": NaN}', "temperature is nan"),
        ('{"temperature": 1e999}', "temperature is inf"),
        ({"temperature": 10**300}, "temperature is 1000"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"do_sample": "no"}, "do_sample is 'no'"),
        ({"num_beams": 4}, "num_beams = 4 is not supported"),
        ({"typical_p": 0.9}, "typical_p = 0.9 is not supported"),
        ("{", "no valid JSON"),
        ("[1]", "holds a list"),
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_wrong_costs_a_note(tmp_path: Path, content: Any, note: str) -> None:
    if isinstance(content, dict):
        content = content | {"min_p": 0.25}  # the rest still counts
    found = of_folder(tmp_path, content)
    assert found.said() == ({"min_p": 0.25} if isinstance(content, dict) else {})
    (line,) = found.notes
    assert "generation_config.json" in line
    assert note in line
    assert len(line) < 300


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({"temp": "hot"}, "temperature is 'hot'"),
        ({"top_p": 3.0}, "top_p is 3.0"),
        ({"mirostat": 2}, "mirostat = 2"),
        ({"xtc_probability": 0.5}, "xtc_probability = 0.5"),
        ({"penalty_repeat": 1.1, "penalty_last_n": 64}, "penalty_last_n = 64"),
    ],
)
def test_gguf_values_that_cannot_be_taken(values: dict[str, Any], note: str) -> None:
    (line,) = of_gguf(**values).notes
    assert note in line
    assert "general.sampling" in line


def test_gguf_values_that_change_nothing() -> None:
    assert of_gguf(mirostat=0, xtc_probability=0.0, penalty_last_n=64, sequence="k;p").notes == ()
