"""The locks hold what pyproject.toml asks for, and pyproject.toml asks for what the code imports."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "locks"
WITHOUT_HASH = {"torch", "triton"}
UNBOUNDED = {"pip", "packaging"}  # no upper bound: other programs of an environment have them, too
IMPORTED_AS = {
    "huggingface_hub": "huggingface-hub",
    "markdown_it": "markdown-it-py",
    "opentelemetry": "opentelemetry-sdk",
    "prometheus_client": "prometheus-client",
    "prompt_toolkit": "prompt-toolkit",
    "pydantic_core": "pydantic",  # which pins it
}


def lists() -> dict[str, list[Requirement]]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = settings["project"]
    found = {
        "build": settings["build-system"]["requires"],
        "app": project["dependencies"],
        **project["optional-dependencies"],
    }
    return {name: [Requirement(line) for line in lines] for name, lines in found.items()}


LISTS = lists()


def pins(name: str) -> dict[str, list[tuple[Version, str, int]]]:
    """By package: versions with their markers and numbers of hashes."""
    found: dict[str, list[tuple[Version, str, int]]] = {}
    text = (LOCKS / f"{name}.txt").read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        pin, *hashes = line.split("--hash=sha256:")
        requirement = Requirement(pin)
        (exact,) = requirement.specifier
        assert exact.operator == "==", line
        found.setdefault(canonicalize_name(requirement.name), []).append(
            (Version(exact.version), str(requirement.marker or ""), len(hashes))
        )
    return found


def test_each_list_has_its_lock_and_no_other_is_there() -> None:
    assert {path.stem for path in LOCKS.glob("*.txt")} == {*LISTS, "unhashed"}


@pytest.mark.parametrize("name", LISTS)
def test_the_lock_satisfies_its_list(name: str) -> None:
    locked = pins(name)
    for requirement in LISTS[name]:
        package = canonicalize_name(requirement.name)
        if package in WITHOUT_HASH:
            continue
        assert package in locked, f"locks/{name}.txt lacks {package}; run `make lock`"
        for version, _, _ in locked[package]:
            assert requirement.specifier.contains(version), (
                f"locks/{name}.txt has {package} {version}, outside of {requirement}; run `make lock`"
            )


@pytest.mark.parametrize("name", LISTS)
def test_locks_are_whole_and_name_no_place(name: str) -> None:
    locked = pins(name)
    assert all(hashes for found in locked.values() for _, _, hashes in found)
    assert not WITHOUT_HASH & locked.keys()
    assert not [package for package in locked if package.startswith(("nvidia-", "cuda-"))]
    text = (LOCKS / f"{name}.txt").read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"(?m)^\s*-(?!-hash=)", text)  # no option, such as an index's address


def test_locks_can_be_installed_together() -> None:
    seen: dict[tuple[str, str], Version] = {}
    for name in LISTS:
        for package, found in pins(name).items():
            for version, marker, _ in found:
                assert seen.setdefault((package, marker), version) == version, (name, package)


def test_torch_is_pinned_without_a_hash() -> None:
    (wanted,) = (r for r in LISTS["test"] if r.name == "torch")
    lines = (LOCKS / "unhashed.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == [str(wanted)]


@pytest.mark.parametrize("name", LISTS)
def test_requirements_have_both_bounds(name: str) -> None:
    for requirement in LISTS[name]:
        operators = {part.operator for part in requirement.specifier}
        wanted = {">="} if requirement.name in UNBOUNDED else {">=", "<"}
        assert operators in (wanted, {"=="}), str(requirement)


def imported() -> Iterator[tuple[str, Path]]:
    for path in (ROOT / "src" / "sartor").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((alias.name, path) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield node.module or "", path


def test_what_is_imported_is_asked_for_and_the_reverse() -> None:
    needed = {
        IMPORTED_AS.get(name, name)
        for name in {name.partition(".")[0] for name, _ in imported()}
        if name != "sartor" and name not in sys.stdlib_module_names
    }
    app = {canonicalize_name(requirement.name) for requirement in LISTS["app"]}
    extras = {r.name for name, lines in LISTS.items() if name != "build" for r in lines}
    assert needed <= app | extras
    # pip is run, not imported, and uvicorn's server finds uvloop by its name where it is there.
    assert app - {"pip"} <= needed
