"""What a start does not do: import what it does not need, read weights, trust a damaged cache."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_tiny_model

from sartor.cli.main import guarded
from sartor.formats import gguf as gguf_format
from sartor.models.registry import MODEL_FILES

Capture = pytest.CaptureFixture[str]
HEAVY = {
    "fastapi", "starlette", "uvicorn", "pydantic", "rich", "torch",
    "transformers", "huggingface_hub", "safetensors", "requests", "httpx", "psutil",
    "asyncio", "multiprocessing", "importlib.metadata", "prometheus_client", "argparse",
    "sartor.cli.serve", "sartor.cli.bench", "sartor.serving", "sartor.evaluation", "sartor.bench",
    "sartor.formats.safetensors",
    "sartor.backends.torch", "sartor.backends.reference", "sartor.backends.conformance",
}  # fmt: skip
"""Nothing of it is needed to answer from a stored GGUF model."""


def answer(capsys: Capture, model: Path, *options: str) -> dict[str, Any]:
    asked = ["run", str(model), "hello there", "--json", "--temperature", "0", "--max-tokens", "9"]
    assert guarded([*asked, *options]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return {key: found[key] for key in ("text", "prompt_tokens", "completion_tokens")}


def caches(home: Path) -> list[Path]:
    return sorted((home / "packed").glob("*.packed"))


def test_run_imports_only_what_it_needs(tiny: Path) -> None:
    code = (
        "import sys; from sartor.cli.main import guarded; "
        f"guarded(['run', {str(tiny)!r}, 'hi', '--max-tokens', '1']); "
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    modules = set(done.stderr.splitlines()[-1].split())
    assert not HEAVY & modules
    models = {f"sartor.models.{name}" for name in MODEL_FILES}
    # Experts and recurrent blocks are shared; of the models only the one that runs is there.
    assert models & modules == {"sartor.models.llama"}


def test_a_packed_model_is_not_read_again(
    capsys: Capture, tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = answer(capsys, tiny)
    assert len(caches(home)) == 1

    def forbidden(*arguments: object) -> object:
        raise AssertionError("a packed model needs no weight of its source")

    monkeypatch.setattr(gguf_format.GgufCheckpoint, "weight", forbidden)
    assert answer(capsys, tiny) == first


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    "damage", [truncated, lambda _: b"", lambda _: b"no packed file" * 1000, lambda _: bytes(9999)]
)
def test_damaged_caches_are_made_again(
    capsys: Capture, tiny: Path, home: Path, damage: Callable[[bytes], bytes]
) -> None:
    first = answer(capsys, tiny)
    whole = {path: path.read_bytes() for path in caches(home)}
    for path, content in whole.items():
        path.write_bytes(damage(content))
    assert answer(capsys, tiny) == first
    assert {path: path.read_bytes() for path in caches(home)} == whole


def test_caches_that_cannot_be_written_are_done_without(
    capsys: Capture, tiny: Path, home: Path
) -> None:
    first = answer(capsys, tiny)
    shutil.rmtree(home / "packed")
    (home / "packed").write_text("in the way")
    assert answer(capsys, tiny) == first


def test_another_model_under_the_same_name_is_noticed(capsys: Capture, tmp_path: Path) -> None:
    """Another vocabulary, of the same size, in the place of the first."""
    path = write_tiny_model(tmp_path / "model.gguf")
    first = answer(capsys, path)
    other = path.read_bytes()
    for one, another in ((b"he", b"eh"), (b"h e", b"e h")):  # the merged token, and its merge
        length = len(one).to_bytes(8, "little")
        assert other.count(length + one) == 1
        other = other.replace(length + one, length + another)
    replacement = tmp_path / "other.gguf"
    replacement.write_bytes(other)
    fresh = answer(capsys, replacement)
    replacement.replace(path)
    assert answer(capsys, path) == fresh != first
