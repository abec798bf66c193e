"""A backend and a CPU kernel from a package of their own, installed as a stranger would."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from example_chip import EXAMPLE, ROOT, Python

import sartor

COMMAND = ("-c", "from sartor.cli.main import main; main()")
FP32 = ("--activation", "fp32", "--kv", "fp32")
CHIP = {"linear", "embedding", "rms_norm", "add_rms_norm", "add", "attention"}
HERE = Path(__file__).parent
PAGES = (ROOT / "docs" / "adding-a-chip.md", EXAMPLE / "README.md")


def answer(python: Python, *arguments: object, **more: str) -> dict[str, Any]:
    done = python(*COMMAND, *map(str, arguments), "--json", **more)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_nothing_in_sartor_knows_the_example() -> None:
    files = [p for p in Path(sartor.__file__).parent.rglob("*.py") if "native" not in p.parts]
    assert len(files) > 100
    assert [p for p in files if "example_chip" in p.read_text(encoding="utf-8")] == []


def test_the_backend_is_found(python: Python) -> None:
    program = "from sartor.backends.registry import *; print(backend_names(), choose('example')[1])"
    done = python("-c", program)
    assert "'example'" in done.stdout
    assert "Device(name='example', backend='example'" in done.stdout


def test_conformance_finds_it_right_in_every_cell(python: Python) -> None:
    found = answer(python, "conformance", "--backend", "example")
    (backend,) = found["backends"]
    assert (found["right"], backend["device"]) == (True, "example")
    assert found["cases"] > 100
    assert {m["lacks"] for m in backend["not_offered"]} == {
        "activation int8",
        "kv bf16",
        "kv fp16",
        "kv int8",
    }
    for result in found["results"]:
        place = "chip fp64" if result["path"].split()[-1] in CHIP else "host"
        assert result["path"].startswith(place)
    paths = {result["path"].split()[-1] for result in found["results"]}
    assert paths >= CHIP - {"embedding"}  # which shows in the scale that follows it


def test_a_wrong_kernel_is_a_line_and_exit_code_1(python: Python) -> None:
    program = """
import sartor_example_chip.kernels as k
k.KERNELS["rms_norm"] = lambda step, inputs, **_: step.chip(inputs[0])
from sartor.cli.main import main
main()
"""
    done = python("-c", program, "conformance", "--backend", "example")
    assert done.returncode == 1
    failures = done.stdout.split("\n\n")[1].splitlines()[1:]
    assert {line.split()[1].partition("/")[0] for line in failures} == {"rms_norm"}
    assert all("chip fp64 rms_norm: wrong result" in line for line in failures)


def test_it_answers_as_the_reference_does(python: Python, tiny: Path) -> None:
    greedy = ("--temperature", 0, "--max-tokens", 12, *FP32)
    texts = [
        answer(python, "run", tiny, "hello", "--backend", name, *greedy)["text"]
        for name in ("example", "reference")
    ]
    assert texts[0] == texts[1] != ""


def test_windows_recurrence_and_adapters_too(python: Python) -> None:
    found = [python(str(HERE / "answers_of.py"), name) for name in ("example", "reference")]
    assert [done.stderr for done in found] == ["", ""]
    example, reference = (json.loads(done.stdout) for done in found)
    assert example == reference
    assert example["adapted"] != example["r2"]


def test_a_plan_that_it_cannot_run_is_refused_by_name(python: Python, tiny: Path) -> None:
    done = python(*COMMAND, "run", str(tiny), "hello", "--backend", "example", "--kv", "fp32")
    assert done.returncode == 1
    assert done.stderr.endswith("choose from fp32\n")
    assert "activation int8 is not supported by backend example" in done.stderr


def test_the_cpu_kernel_waits_to_be_asked_for(python: Python) -> None:
    probe = "from sartor.backends.cpu.custom import custom_kernels as c; print(list(c()))"
    assert python("-c", probe).stdout == "[]\n"
    assert python("-c", probe, SARTOR_EXAMPLE_KERNELS="1").stdout == "['gated_activation']\n"
    assert "set it to 1" in python("-c", probe, SARTOR_EXAMPLE_KERNELS="yes").stderr


def test_the_cpu_kernel_runs_and_is_right(python: Python, tiny: Path) -> None:
    asked = {"SARTOR_EXAMPLE_KERNELS": "1"}
    found = answer(python, "conformance", "--backend", "cpu", **asked)
    assert found["right"]
    paths = {r["path"] for r in found["results"] if r["operator"] == "gated_activation"}
    assert paths == {"example gated_activation"}
    assert not any("example" in r["path"] for r in found["results"] if r["path"] not in paths)
    greedy = ("--backend", "cpu", "--temperature", 0, "--max-tokens", 8, *FP32)
    texts = [answer(python, "run", tiny, "hello", *greedy, **more)["text"] for more in (asked, {})]
    assert texts[0] == texts[1] != ""


# What the pages say can be done ---------------------------------------------------------


def commands() -> list[str]:
    found: dict[str, None] = {}
    for page in PAGES:
        for block in re.findall(r"(?ms)^```console\n(.*?)^```", page.read_text(encoding="utf-8")):
            for line in block.splitlines():
                assert line.startswith("$ ")
                found.setdefault(line[2:].partition(" # ")[0].rstrip())
    return list(found)


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_pages_run(line: str, python: Python, tiny: Path) -> None:
    words = shlex.split(line)
    variables = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    assert words[0] == "sartor"
    words = [str(tiny) if word == "smollm2:135m" else word for word in words[1:]]
    short = ["--max-tokens", "4"] if words[0] == "run" else []
    done = python(*COMMAND, *words, *short, **variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_files_and_names_of_the_page_exist() -> None:
    """What the page puts in backquotes with a slash and a suffix is a file that is there."""
    text = PAGES[0].read_text(encoding="utf-8")
    house = ROOT / "src" / "sartor"
    roots = (ROOT, EXAMPLE, house, house / "native" / "include")
    named = re.findall(r"`([\w/.-]+/[\w.-]+\.(?:py|h|c|md|toml))`", text)
    assert len(named) > 5
    for name in named:
        assert any((root / name).exists() for root in roots), name


def test_the_install_command_is_the_one_that_runs_here() -> None:
    for page in PAGES:
        assert "pip install --no-build-isolation ./examples/sartor-example-chip" in page.read_text(
            encoding="utf-8"
        )
