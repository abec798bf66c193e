"""Models and backends do not know each other: M + N pieces of work, not M x N."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sartor.backends.registry import BUILT_IN
from sartor.models import architectures

HOUSE = Path(__file__).parents[1] / "src" / "sartor"
BACKENDS = {*BUILT_IN, "cuda", "opencl", "triton", "avx2", "avx512", "amx"} - {"reference", "null"}
MODELS = {
    name.lower()
    for entry in architectures()
    for name in (entry.name, *entry.hf_names, *entry.gguf_names)
}


def words(source: str) -> Iterator[str]:
    """Words of identifiers and strings of a module; what only people read is left out."""
    tree = ast.parse(source)
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in documentation:
                yield from re.findall(r"[\w-]+", node.value.lower())
        elif isinstance(node, ast.Name):
            yield node.id.lower()
        elif isinstance(node, ast.Attribute):
            yield node.attr.lower()
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or "").split(".")


def native_words(source: str) -> Iterator[str]:
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)
    yield from re.findall(r"\w+", code.lower())


@pytest.mark.parametrize("path", sorted((HOUSE / "models").rglob("*.py")), ids=lambda p: p.name)
def test_no_model_file_names_a_backend(path: Path) -> None:
    assert BACKENDS & set(words(path.read_text(encoding="utf-8"))) == set()


def test_no_backend_names_a_model() -> None:
    for path in sorted((HOUSE / "backends").rglob("*.py")):
        found = MODELS & set(words(path.read_text(encoding="utf-8")))
        assert not found, f"{path.relative_to(HOUSE)} names {found}"
    for path in sorted((HOUSE / "native").rglob("*.?pp")):
        found = MODELS & set(native_words(path.read_text(encoding="utf-8")))
        assert not found, f"{path.relative_to(HOUSE)} names {found}"


def test_names_are_found() -> None:
    assert "cuda" in set(words("device = 'cuda:0'"))
    assert "gemma3" in set(words("if config.gemma3: pass"))
    assert "llama" not in set(words('"""As in llama."""'))
    assert "gemma3" in set(native_words("if (gemma3) // gemma2")) - {"gemma2"}
    assert len(MODELS) > 20


def test_no_two_test_files_share_a_name() -> None:
    """pytest imports them by their names alone."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
