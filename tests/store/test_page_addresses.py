"""References as people write and paste them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sartor.errors import UsageError
from sartor.store import ModelRef, parse_ref

HF = "huggingface.co"
MS = "modelscope.cn"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", ModelRef("hf", "org/name")),
        ("org/name/", ModelRef("hf", "org/name")),
        ("Org/Name-7B.v2_GGUF", ModelRef("hf", "Org/Name-7B.v2_GGUF")),
        ("org/name:Q4_K_M", ModelRef("hf", "org/name", quant="Q4_K_M")),
        ("org/name:q4_k_m", ModelRef("hf", "org/name", quant="Q4_K_M")),
        ("org/name:ud-q4_k_xl", ModelRef("hf", "org/name", quant="UD-Q4_K_XL")),
        ("org/name:latest", ModelRef("hf", "org/name")),
        ("org/name@v1.0", ModelRef("hf", "org/name", "v1.0")),
        ("org/name/sub/m-Q8_0.gguf", ModelRef("hf", "org/name", file="sub/m-Q8_0.gguf")),
        ("hf:org/name:Q8_0", ModelRef("hf", "org/name", quant="Q8_0")),
        ("HF:org/name:Q8_0", ModelRef("hf", "org/name", quant="Q8_0")),
        ("hf:org/name@v1:Q8_0", ModelRef("hf", "org/name", "v1", quant="Q8_0")),
        ("modelscope:org/name:iq4_xs", ModelRef("modelscope", "org/name", quant="IQ4_XS")),
        ("hf://org/name", ModelRef("hf", "org/name")),
        ("hf.co/org/name", ModelRef("hf", "org/name")),
        ("hf.co/org/name:Q4_K_M", ModelRef("hf", "org/name", quant="Q4_K_M")),
        (f"https://{HF}/org/name", ModelRef("hf", "org/name")),
        (f"HTTPS://WWW.{HF}/org/name/", ModelRef("hf", "org/name")),
        (f"hf:https://{HF}/org/name", ModelRef("hf", "org/name")),
        (f"{HF}/org/name/tree/main", ModelRef("hf", "org/name")),
        (f"http://{HF}/org/name?library=transformers#use", ModelRef("hf", "org/name")),
        (f"https://{HF}/org/name/tree/v2", ModelRef("hf", "org/name", "v2")),
        (f"https://{HF}/org/name/tree/refs%2Fpr%2F1", ModelRef("hf", "org/name", "refs%2Fpr%2F1")),
        (f"https://{HF}/org/name/tree/main/UD-Q4_K_XL", ModelRef("hf", "org/name", quant="UD-Q4_K_XL")),
        (f"https://{HF}/org/name/blob/main/m.gguf", ModelRef("hf", "org/name", file="m.gguf")),
        (f"https://{HF}/org/name/blob/main/a%20b.gguf", ModelRef("hf", "org/name", file="a b.gguf")),
        (f"https://{HF}/org/name/blob/v2/q/m.GGUF", ModelRef("hf", "org/name", "v2", "q/m.GGUF")),
        (f"https://{HF}/org/name/resolve/main/m.gguf?download=true", ModelRef("hf", "org/name", file="m.gguf")),
        (f"https://{HF}/org/name?show_file_info=m-Q8_0.gguf", ModelRef("hf", "org/name", file="m-Q8_0.gguf")),
        (f"https://{HF}/org/name/blob/main/README.md", ModelRef("hf", "org/name")),
        (f"https://{HF}/org/name/blob/main/model-00001-of-00002.safetensors", ModelRef("hf", "org/name")),
        (f"https://{HF}/org/name/discussions/3", ModelRef("hf", "org/name")),
        (f"https://{HF}/org/name.git", ModelRef("hf", "org/name")),
        (f"https://{HF}/api/models/org/name", ModelRef("hf", "org/name")),
        (f"https://{HF}/org/name/commit/abc123", ModelRef("hf", "org/name", "abc123")),
        (f"https://www.{MS}/models/org/name", ModelRef("modelscope", "org/name")),
        (f"{MS}/models/org/name/summary", ModelRef("modelscope", "org/name")),
        (f"https://{MS}/models/org/name/files", ModelRef("modelscope", "org/name")),
        (f"https://{MS}/models/org/name/file/view/master/m.gguf?status=2", ModelRef("modelscope", "org/name", file="m.gguf")),
        (f"https://{MS}/models/org/name/file/view/master?fileName=m.gguf&status=2", ModelRef("modelscope", "org/name", file="m.gguf")),
        (f"https://{MS}/models/org/name/resolve/v1/m.gguf", ModelRef("modelscope", "org/name", "v1", "m.gguf")),
    ],
)  # fmt: skip
def test_what_people_paste(text: str, expected: ModelRef) -> None:
    assert parse_ref(text) == expected
    assert parse_ref(f"  {text}\n") == expected
    assert parse_ref(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"https://{HF}/datasets/org/name", "datasets, not a model"),
        (f"https://{HF}/spaces/org/name", "spaces, not a model"),
        (f"https://{HF}/gpt2", "names no model"),
        (f"https://{HF}", "names no model"),
        ("https://example.org/m.gguf", "download the file"),
        (f"https://{HF}/org/name/tree/main/onnx", "a folder of a repository"),
        (f"https://{HF}/org/name/blob/main/../../x.gguf", "outside"),
        ("https://[x/org/name", "check it"),
        ("[x", "unknown model"),
        ("hf:org/name/m.gguf:Q4_0", "leave one of them away"),
        ("models/m.gguf", "check the path"),
        ("org/name/sub/m.safetensors", "check the path"),
        ("./org/name", "check the path"),
        ("/org/name", "check the path"),
        ("~/org/name", "check the path"),
        ("a b/c", "check the path"),
    ],
)
def test_what_is_not_a_model(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_ref(text)


def test_a_path_that_exists_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_ref("org/name").kind == "hf"
    (tmp_path / "org" / "name").mkdir(parents=True)
    for text in ("org/name", "org/name/", "file://" + str(tmp_path / "org" / "name")):
        assert parse_ref(text) == ModelRef("path", str(tmp_path / "org" / "name"))
    assert parse_ref("hf:org/name").kind == "hf"
    assert parse_ref("org/other").kind == "hf"
    with pytest.raises(UsageError, match="check the path"):
        parse_ref("org/name/none.gguf")  # the path begins here


def test_mirrors_of_the_environment_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example.org/")
    assert parse_ref("https://hub.example.org/org/name") == ModelRef("hf", "org/name")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("smolm2:135m", "did you mean smollm2:135m?"),
        ("SmolLM:135", "did you mean smollm2:135m?"),
        ("llama3:1b", "did you mean llama3.2:1b?"),
        ("gema3:1b", "did you mean gemma3:1b?"),
        ("qwen-3:0.6b", "did you mean qwen3:0.6b?"),
        ("gpt-oss", "did you mean gpt-oss:20b?"),
        ("mistral7b", "did you mean mistral:7b?"),
    ],
)
def test_misspelled_names(typed: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_ref(typed)
    assert meant in str(caught.value)


def test_a_path_object_is_never_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sartor.engine.llm import LLM

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="check the path"):
        LLM(Path("org/name"))
