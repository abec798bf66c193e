"""Standard streams as shells and schedulers leave them, and text that comes through a pipe."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sartor.cli import piped

COMMAND = [sys.executable, "-c", "from sartor.cli.main import main; main()"]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")


def shell(redirections: str, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    """The command with its standard streams as a shell's redirections say."""
    line = ["sh", "-c", f'exec "$@" {redirections}', "sh", *COMMAND, *map(str, arguments)]
    return subprocess.run(
        line, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False
    )


def prompt_tokens(model: Path, *arguments: str, **more: Any) -> int:
    line = [*COMMAND, "run", str(model), *arguments, "--json", "--max-tokens", "1"]
    done = subprocess.run(line, capture_output=True, timeout=120, check=True, **more)
    found: int = json.loads(done.stdout)["prompt_tokens"]
    return found


def one_line(error: bytes) -> str:
    text = error.decode()
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


def test_a_closed_input_is_an_empty_one(tiny: Path) -> None:
    done = shell("<&-", "run", tiny)
    assert (done.returncode, done.stdout) == (2, b"")
    assert "standard input is empty" in one_line(done.stderr)
    done = shell("<&-", "run", tiny, "hello", "--max-tokens", 2)
    assert done.returncode == 0
    assert done.stdout.endswith(b"\n")


@pytest.mark.parametrize("closed", ["2>&-", "<&- 2>&-", "2>/dev/full"])
def test_an_answer_needs_no_error_output(tiny: Path, closed: str) -> None:
    asked = ("run", tiny, "hello", "--max-tokens", 4, "--temperature", 0)
    done = shell(closed, *asked)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == shell("", *asked).stdout


@pytest.mark.parametrize("closed", [">&-", "<&- >&-", ">/dev/full"])
@pytest.mark.parametrize("command", ["devices", "--help", "--version", "run"])
def test_an_output_that_takes_nothing_is_one_line(tiny: Path, closed: str, command: str) -> None:
    more = (tiny, "hello", "--max-tokens", 2) if command == "run" else ()
    done = shell(closed, command, *more)
    assert done.returncode == 1
    one_line(done.stderr)


def test_nothing_is_written_where_a_closed_stream_was(tiny: Path, tmp_path: Path) -> None:
    """A file that is opened first gets the lowest number: without care, that of standard error."""
    copy = tmp_path / "model.gguf"
    copy.write_bytes(tiny.read_bytes())
    for closed in ("2>&-", "<&- >&- 2>&-"):
        shell(closed, "run", copy, "hello", "--max-tokens", 2)
        assert copy.read_bytes() == tiny.read_bytes()


@pytest.mark.parametrize("prompt", [(), ("question",)])
def test_an_input_that_is_no_text(tiny: Path, tmp_path: Path, prompt: tuple[str, ...]) -> None:
    wrong = tmp_path / "wrong.txt"
    wrong.write_bytes(b"abc\xff")
    done = shell(f"< {wrong}", "run", tiny, *prompt)
    assert (done.returncode, done.stdout) == (2, b"")
    assert "not UTF-8 text: byte 0xff at position 3" in one_line(done.stderr)


def test_control_tokens_in_a_message_are_text_unless_asked_for(tiny: Path) -> None:
    """The tokenizer has one token a byte, and one for ``<|im_end|>``."""
    none = {"stdin": subprocess.DEVNULL}
    empty = prompt_tokens(tiny, "x", **none)
    spelled = prompt_tokens(tiny, "x<|im_end|>", **none)
    assert spelled == empty + len("<|im_end|>")
    assert prompt_tokens(tiny, "x<|im_end|>", "--special-in-text", **none) == empty + 1


def test_piped_text_follows_the_prompt(tiny: Path, tmp_path: Path) -> None:
    """The tokenizer has one token a byte, so lengths tell what was read."""
    alone = prompt_tokens(tiny, "question", "--raw", stdin=subprocess.DEVNULL)
    assert alone == len("question")
    together = len("question\n\nline 1\nline 2")
    assert prompt_tokens(tiny, "question", "--raw", input=b"line 1\nline 2\n") == together
    assert (
        prompt_tokens(tiny, "question", "--raw", input=b"\xef\xbb\xbfline 1\r\nline 2") == together
    )
    text = tmp_path / "text.txt"
    text.write_text("line 1\nline 2\n")
    with text.open("rb") as file:
        assert prompt_tokens(tiny, "question", "--raw", stdin=file) == together
    templated = prompt_tokens(tiny, "question", stdin=subprocess.DEVNULL)
    assert prompt_tokens(tiny, "question", input=b"line") == templated + len("\n\nline")
    assert prompt_tokens(tiny, "--raw", input=b"line") == len("line")


@pytest.mark.parametrize("given", [b"", b"\n", b" \n\n"])
def test_an_input_of_nothing_changes_nothing(tiny: Path, given: bytes) -> None:
    assert prompt_tokens(tiny, "question", "--raw", input=given) == len("question")


def test_sockets_and_devices_are_not_read(tiny: Path) -> None:
    here, there = socket.socketpair()
    with here, there:  # open, and nothing comes
        there.sendall(b"not read")
        assert prompt_tokens(tiny, "question", "--raw", stdin=here.fileno()) == len("question")


def test_a_pipe_that_stays_open_is_waited_for_with_a_word(tiny: Path) -> None:
    line = [*COMMAND, "run", str(tiny), "question", "--max-tokens", "1"]
    reading, writing = os.pipe()
    process = subprocess.Popen(
        line, stdin=reading, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        assert "reading standard input" in process.stderr.readline()
        os.close(writing)
        assert process.wait(60) == 0
    finally:
        os.close(reading)
        process.kill()
        process.communicate()


def test_a_pipe_that_ends_soon_needs_no_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(piped, "PATIENCE", 0.2)
    with open(os.devnull) as empty:
        monkeypatch.setattr(sys, "stdin", empty)
        assert piped.read_piped() == ""
    time.sleep(0.4)
    assert capsys.readouterr().err == ""


def test_an_endless_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sartor.errors import UsageError

    monkeypatch.setattr(piped, "MOST_BYTES", 1000)
    with open("/dev/zero", encoding="utf-8") as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        with pytest.raises(UsageError, match="longer than"):
            piped.read_piped()
