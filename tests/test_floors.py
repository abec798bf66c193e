"""The house's one rule: a folder imports only from floors below its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sartor

HOUSE = Path(sartor.__file__).parent
FLOORS = {
    "cli": 7,
    "fit": 6,
    "bench": 6,
    "serving": 5,
    "evaluation": 5,
    "quantization": 4,
    "engine": 4,
    "models": 3,
    "backends": 3,
    "text": 3,
    "graph": 2,
    "formats": 2,
    "ops": 1,
    "hardware": 1,
    "plan": 1,
    "store": 1,
    "progress": 0,
}
FREE = {"errors", "printable", "__version__"}
"""What every floor may import from the house's entrance."""


def rooms() -> list[str]:
    return sorted(path.parent.name for path in HOUSE.glob("*/__init__.py"))


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and first name below ``sartor`` of every import, also of those inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write it out"
            base = node.module or ""
            names = [f"{base}.{a.name}" for a in node.names] if base == "sartor" else [base]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "sartor":
                yield node.lineno, rest.partition(".")[0]


def violations(room: str, source: str) -> list[str]:
    """Imports of ``source`` that its floor does not allow."""
    return [
        f"line {line}: {room} (floor {FLOORS[room]}) imports {target or 'the whole package'}"
        for line, target in imports(source)
        if target not in FREE and target != room and FLOORS.get(target, 99) >= FLOORS[room]
    ]


def test_every_folder_has_a_floor() -> None:
    assert [room for room in rooms() if room not in FLOORS] == []


@pytest.mark.parametrize("room", rooms())
def test_imports_go_down(room: str) -> None:
    wrong = [
        f"{path.relative_to(HOUSE)}, {problem}"
        for path in sorted((HOUSE / room).rglob("*.py"))
        for problem in violations(room, path.read_text(encoding="utf-8"))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "source",
    [
        "import sartor.engine.llm",
        "from sartor.models import load_model",  # the same floor, another folder
        "from sartor import LLM",
        "import sartor",
        "def f():\n    from sartor.cli.main import main",
    ],
)
def test_a_wrong_import_is_found(source: str) -> None:
    assert violations("text", source) != []


def test_right_imports_pass() -> None:
    source = "from sartor.errors import UsageError\nfrom sartor.text.gguf import x\nimport numpy\n"
    assert violations("text", source + "from sartor.graph import Batch\n") == []
