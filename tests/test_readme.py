"""What the README says can be done."""

from __future__ import annotations

import ast
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from sartor.cli.main import guarded

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHEAP = ("list", "show", "devices")
GROUPS = ("keys",)  # whose commands are two words


def blocks(kind: str) -> list[str]:
    return re.findall(rf"(?ms)^```{kind}\n(.*?)^```", README)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("console") for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in lines)
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]


def test_there_are_commands() -> None:
    assert len(commands()) >= 9


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_exist_with_their_options(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command[0] == "sartor"
    words = 3 if command[1] in GROUPS else 2
    assert guarded([*command[1:words], "--help"]) == 0
    offered = capsys.readouterr().out
    for word in command[2:]:
        if word.startswith("--"):
            assert f"  {word} " in offered


@pytest.mark.parametrize("command", [c for c in commands() if c[1] in CHEAP], ids=" ".join)
def test_cheap_commands_run(
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("SARTOR_HOME", str(tmp_path))
    assert guarded(command[1:]) == 0
    assert capsys.readouterr().out


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"\bmake (?:-C \S+ )?([a-z]+)\b", "\n".join(blocks("sh")) + README)
    assert {"run", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"(?m)^{target}:", makefile), target


def test_models_are_in_the_catalogue() -> None:
    from sartor.store import default_catalogue

    for name in re.findall(r"\b[a-z0-9.]+:(?:[0-9.]+[mb]|l6)\b", README):
        assert name in default_catalogue()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_python_examples(
    model_files: dict[str, Path],
    minilm: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import sartor
    from sartor.engine.llm import LLM

    paths = {"smollm2:135m": model_files["smollm2-135m"], "minilm:l6": minilm}
    monkeypatch.setattr(sartor, "LLM", lambda name: LLM(paths[name]), raising=False)
    text, vectors = blocks("python")
    exec(compile(ast.parse(text), "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 3
    exec(compile(ast.parse(vectors), "README.md", "exec"), {})
    closer, farther = (float(number) for number in re.findall(r"0\.\d+", capsys.readouterr().out))
    assert closer > farther


def test_the_request_example_is_valid() -> None:
    request = re.search(r"-d '(\{.*?\})'", README, re.DOTALL)
    assert request is not None
    assert json.loads(request[1])["model"] == "smollm2:135m"


def test_the_page_on_installing_names_what_is_there() -> None:
    page = (ROOT / "docs" / "installing.md").read_text(encoding="utf-8")
    for lock in re.findall(r"locks/[a-z]+\.txt", page):
        assert (ROOT / lock).is_file(), lock
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(re.findall(r"(?m)^\| `(\w+)` \|", page))
    assert extras <= project["optional-dependencies"].keys()
    assert extras == project["optional-dependencies"].keys() - {"test", "clients", "dev"}
