"""The line in a terminal: what the screen shows, in what width, and what is left of it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time

import pytest

from sartor.progress import SILENT, Progress, showing
from sartor.progress.line import ProgressLine, screen

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX terminals")
if sys.platform != "win32":
    from terminal import Shown, in_terminal, resize

HEAD = """
import logging, sys, time
from sartor.progress import showing
from sartor.progress.line import ProgressLine
line = ProgressLine()
"""


def shown(code: str, columns: int = 80, **environment: str) -> Shown:
    return in_terminal([sys.executable, "-c", HEAD + code], columns, environment)


LONG = """
with showing(line, "packing a-model-with-a-rather-long-name:270m", 20, "tensors"):
    for _ in range(20):
        time.sleep(0.06)
        line.advance(1)
print("done")
"""


@pytest.mark.parametrize("columns", [60, 80, 120, 200])
def test_a_line_that_is_rewritten_and_gone_in_the_end(columns: int) -> None:
    found = shown(LONG, columns)
    assert found.code == 0
    assert found.final == ["done"]
    # One row at any time: nothing wraps, nothing is left over.
    assert max(map(len, found.frames)) == 1
    lines = [rows[0] for rows in found.frames if rows and "packing" in rows[0]]
    assert len(lines) >= 3
    assert any("%" in text and " s left" in text for text in lines)
    assert columns < 120 or any("/20 tensors" in text for text in lines)
    assert columns < 120 or all("packing a-model-with-a-rather-long-name:270m" in x for x in lines)
    assert b"\x1b[?" not in found.raw  # no mode that a killed process would leave behind


def test_what_ends_soon_is_not_shown() -> None:
    code = "for _ in range(3):\n    with showing(line, 'x', 2, 'parts'): time.sleep(0.05)\n"
    assert shown(code).raw == b""


def test_phases_follow_each_other_without_a_gap() -> None:
    code = """
with showing(line, "the first"): time.sleep(0.6)
with showing(line, "the second"): time.sleep(0.01)
with showing(line, "the third"):
    time.sleep(0.3)
    with showing(line, "inside", 2, "parts"): time.sleep(0.6)
    time.sleep(0.3)
"""
    found = shown(code)
    assert [row for row in ("the first", "the second", "the third") if [row] in found.frames] == [
        "the first", "the second", "the third",
    ]  # fmt: skip
    assert "inside" in found.text
    assert found.final == []


def test_a_narrower_terminal_gets_a_narrower_line() -> None:
    def narrow(rows: list[str], pid: int, fd: int) -> None:
        if rows and "/40" in rows[0]:
            resize(fd, 60)

    code = LONG.replace("20", "40")
    found = in_terminal([sys.executable, "-c", HEAD + code], 150, on_frame=narrow)
    assert found.final == ["done"]
    lengths = [len(rows[0]) for rows in found.frames if rows and "%" in rows[0]]
    assert lengths[0] > 60 > lengths[-1]
    # Where the terminal has broken the wide line in two, all of it is erased.
    assert b"\x1b[J" in found.raw


def test_what_others_write_goes_above() -> None:
    code = """
with showing(line, "packing", 4, "parts"):
    for part in range(4):
        time.sleep(0.4)
        print("a warning", part, file=sys.stderr)
        logging.warning("a log line %d", part)
        sys.stderr.write("without an end ")
        time.sleep(0.3)
        sys.stderr.write("and its end\\n")
        line.advance(1)
line.notice("a notice")
assert sys.stderr is sys.__stderr__
"""
    found = shown(code)
    assert found.code == 0
    assert found.final == [
        row
        for part in range(4)
        for row in (f"a warning {part}", f"WARNING:root:a log line {part}",
                    "without an end and its end")
    ] + ["a notice"]  # fmt: skip
    assert "packing" in found.text


def test_a_terminal_without_a_cursor_gets_plain_lines() -> None:
    code = LONG + "with showing(line, 'short'): pass\n"
    found = shown(code, TERM="dumb")
    assert found.final == ["packing a-model-with-a-rather-long-name:270m ...", "done"]
    assert b"\x1b" not in found.raw
    assert b"\r" not in found.raw.replace(b"\r\n", b"\n")


def test_no_colour_with_or_without_no_color() -> None:
    assert b"\x1b[3" not in shown(LONG).raw
    assert b"\x1b[3" not in shown(LONG, NO_COLOR="1").raw


def test_an_encoding_without_bars_gets_plain_ones() -> None:
    found = shown(LONG, 120, PYTHONIOENCODING="ascii")
    assert "###" in found.text
    assert found.raw.isascii()
    assert found.final == ["done"]


def test_nothing_but_notices_where_it_is_piped() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HEAD + LONG + "line.notice('a notice')"],
        capture_output=True, text=True, timeout=60, env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("done\n", "a notice\n")


def test_an_interrupt_leaves_the_terminal_clean() -> None:
    sent = []

    def interrupt(rows: list[str], pid: int, fd: int) -> None:
        if rows and "/20" in rows[0] and not sent:
            sent.append(time.monotonic())
            os.kill(pid, signal.SIGINT)

    code = f"try:\n    {LONG.strip().replace(chr(10), chr(10) + '    ')}\n"
    code += "except KeyboardInterrupt:\n    print('interrupted')\n"
    found = in_terminal([sys.executable, "-c", HEAD + code], on_frame=interrupt)
    assert sent
    assert found.final == ["interrupted"]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_a_failure_ends_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sartor.progress.line.DELAY", 0.0)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    def work() -> None:
        with showing(ProgressLine(), "dividing"):
            while not terminal.getvalue():
                time.sleep(0.01)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert sys.stderr is terminal
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_a_terminal_that_goes_away_stops_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(Terminal):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sartor.progress.line.DELAY", 0.0)
    terminal = Gone()
    monkeypatch.setattr(sys, "stderr", terminal)
    line = ProgressLine()
    with showing(line, "working", 2, "parts"):
        time.sleep(0.1)
        line.advance(1)
    assert sys.stderr is terminal


def test_where_it_can_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    closed = io.StringIO()
    closed.close()
    assert [screen(s) for s in (None, io.StringIO(), closed, Terminal())] == [
        "none", "none", "none", "line",
    ]  # fmt: skip
    monkeypatch.setenv("TERM", "dumb")
    assert screen(Terminal()) == "plain"


def test_without_standard_error_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    line = ProgressLine()
    line.notice("nobody reads it")
    with showing(line, "x", 3):
        line.part("y")
        line.advance(2)


def test_both_are_a_progress() -> None:
    for progress in (SILENT, ProgressLine()):
        taken: Progress = progress
        with showing(taken, "x", 3, "parts", 1.0):
            taken.part("y")
            taken.advance(1)
