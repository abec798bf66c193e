"""Chats on a terminal: what keys do, and what the screen shows."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("needs a pseudo-terminal", allow_module_level=True)

from terminal_driver import COMMAND, Terminal

SCRIPTED = [sys.executable, str(Path(__file__).with_name("scripted_model.py"))]
TWICE = "(Ctrl-C again, or Ctrl-D, leaves)"


def scripted(text: str, tmp_path: Path) -> list[str]:
    """The command whose model says this."""
    script = tmp_path / "says.txt"
    script.write_text(text, encoding="utf-8")
    return [*SCRIPTED, str(script)]


def go_on(tmp_path: Path) -> None:
    """The model says what comes after its next wait."""
    (tmp_path / "says.txt.go").touch()


def saved(path: Path) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = json.loads(path.read_text())["messages"]
    return messages


def asked(path: Path) -> list[str]:
    """What the person said, in a file that the chat saved."""
    return [message["content"] for message in saved(path) if message["role"] == "user"]


@pytest.mark.parametrize("columns", [60, 200])
def test_messages_of_several_lines(tiny: Path, tmp_path: Path, columns: int) -> None:
    file = tmp_path / "chat.json"
    with Terminal("run", tiny, "--max-tokens", 3, columns=columns) as terminal:
        terminal.prompt(1)
        terminal.paste("def f():\r    return 1\r\rf()")
        terminal.until("f()", 2)
        terminal.type("\r")
        terminal.prompt(2)
        terminal.type('"""first\rsecond "quoted"\r/third"""\r')
        terminal.prompt(3)
        terminal.type("one \\\rtwo\r")
        terminal.prompt(4)
        terminal.type("alt\x1b\renter\r")
        terminal.prompt(5)
        terminal.paste('"""doc"""\nx = 1')
        terminal.type("\r")
        terminal.prompt(6)
        terminal.type("//etc/hosts\r")
        terminal.prompt(7)
        terminal.type(f"/save {file}\r")
        terminal.prompt(8)
        assert all(len(line) <= columns for line in terminal.lines)
        terminal.type("\x04")
        assert terminal.end() == (0, None)
    assert asked(file) == [
        "def f():\n    return 1\n\nf()",
        'first\nsecond "quoted"\n/third',
        "one \ntwo",
        "alt\nenter",
        '"""doc"""\nx = 1',
        "/etc/hosts",
    ]


def test_what_is_typed_and_pasted_during_an_answer(tiny: Path, tmp_path: Path) -> None:
    """It shows nothing, and is there at the prompt; lines of a paste stay together."""
    file = tmp_path / "chat.json"
    command = scripted("Some words\x1a end.", tmp_path)
    with Terminal("run", tiny, command=command) as terminal:
        terminal.prompt(1)
        terminal.type("go\r")
        terminal.until("Some")
        terminal.paste("one\rtwo")
        terminal.type("\r")
        go_on(tmp_path)
        terminal.until("Some words end.")
        shown = terminal.until("two")
        assert shown.index("words end.") < shown.index("one")
        terminal.until("Some", 2)
        go_on(tmp_path)
        terminal.prompt(3)
        terminal.type(f"/save {file}\r")
        terminal.until("saved")
    assert asked(file) == ["go", "one\ntwo"]


def test_interrupts_at_the_prompt(tiny: Path) -> None:
    with Terminal("run", tiny, "--max-tokens", 3) as terminal:
        terminal.prompt(1)
        terminal.type("unwanted")
        terminal.until("unwanted")
        terminal.type("\x03")  # empties the line, and hints at nothing
        terminal.until(lambda text: "unwanted" not in text)
        assert TWICE not in terminal.text
        terminal.type("\x03")
        terminal.until(TWICE)
        terminal.prompt(2)
        terminal.type("hello\r")  # something else came between
        terminal.prompt(3)
        terminal.type("\x03")
        terminal.until(TWICE, 2)
        terminal.prompt(4)
        terminal.type("\x03")
        assert terminal.end() == (0, None)


def test_an_interrupt_stops_the_answer_and_keeps_what_was_said(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    options = ("--backend", "null", "--device", "null-20ms", "--temperature", 0)
    with Terminal("run", tiny, "--max-tokens", 2000, *options) as terminal:
        terminal.prompt(1)
        terminal.type("hello\r")
        terminal.until("> hello")
        terminal.until(lambda text: len(text.split("> hello")[-1].strip()) > 4)
        terminal.type("\x03")
        terminal.until("(stopped)")
        terminal.prompt(2)
        terminal.type(f"/save {file}\r")
        terminal.until("saved 2 messages")
        terminal.prompt(3)
        terminal.type("/exit\r")
        assert terminal.end() == (0, None)
    answer = saved(file)[1]
    assert answer["role"] == "assistant"
    assert 0 < len(answer["content"]) < 2000


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("at_the_prompt", [True, False])
def test_a_signal_leaves_the_terminal_in_order(
    tiny: Path, tmp_path: Path, number: signal.Signals, at_the_prompt: bool
) -> None:
    import termios

    command = scripted("words and\x1a end.", tmp_path)
    with Terminal("run", tiny, command=command) as terminal:
        before = termios.tcgetattr(terminal.descriptor)
        terminal.prompt(1)
        if not at_the_prompt:
            terminal.type("go\r")
            terminal.until("words")
        assert termios.tcgetattr(terminal.descriptor)[3] != before[3]
        os.kill(terminal.pid, number)
        terminal.drain()
        assert termios.tcgetattr(terminal.descriptor)[3] == before[3]
        assert terminal.end() == (None, number)
    assert terminal.raw.rfind("\x1b[?2004l") > terminal.raw.rfind("\x1b[?2004h")


def test_commands(tiny: Path) -> None:
    with Terminal("run", tiny, "--max-tokens", 3, columns=100) as terminal:
        terminal.prompt(1)
        steps = [
            ("/sve x", "there is no command /sve; did you mean /save?"),
            ("/usr/bin/env", "a slash: //usr/bin/env"),
            ("/set temprature 1", "did you mean temperature?"),
            ("/set temperature hot", "temperature is 'hot'; it must be a number"),
            ("/set top_p 2", "top_p is 2.0; it must be a number from 0 to 1"),
            ("/set max-tokens 2", "max_tokens is 2"),
            ("/set seed 1.5", "it must be a whole number"),
            ("/set stop 'a b' c", "stop is 'a b' c"),
            ("/set stop 'a", "has no end"),
            ("/set stop none", "stop is none"),
            ("/set stats maybe", "stats is on or off"),
            ("/set", "repetition_penalty"),
            ("/system", "there is no system prompt"),
            ("/system Be kind.", "system prompt: Be kind."),
            ("/undo", "nothing has been said"),
            ("/retry", "nothing has been said"),
            ("/save x", "nothing has been said"),
            ("/stats", "0 of 2048 tokens"),
            ("/clear now", "/clear takes nothing after it"),
            ("/load", "needs the name of a file"),
            ("/help", "Ctrl-D"),
            ("/st\t", "turns"),
        ]
        for count, (line, says) in enumerate(steps, 2):
            terminal.type(f"{line}\r")
            shown = terminal.prompt(count)
            assert says in " ".join(shown.rsplit("\n> /", 1)[-1].split())
        terminal.type("hello\r")
        terminal.prompt(len(steps) + 2)
        terminal.type("/set stats off\r/retry\r")
        terminal.prompt(len(steps) + 4)
        assert terminal.text.count(", answer 2 tokens") == 1
        terminal.type("/quit\r")
        assert terminal.end() == (0, None)
        assert "Traceback" not in terminal.text


def test_save_and_load(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "a chat.json"
    with Terminal("run", tiny, "--max-tokens", 3, "--system", "Be kind.", columns=200) as terminal:
        terminal.prompt(1)
        terminal.type("hello\r")
        terminal.prompt(2)
        terminal.type(f"/set temperature 0\r/set stop END\r/save {file}\r")
        terminal.until("saved 3 messages")
        terminal.type(f"/save {file}\r")
        terminal.until(f"{file} is there already; /save -f {file} replaces it")
        terminal.type(f"/save -f {file}\r")
        terminal.until("saved 3 messages", 2)
        terminal.type(f"/save {tmp_path}\r")
        terminal.until("is a folder")
        terminal.type(f"/save {tmp_path}/none/x\r")
        terminal.until("cannot be written: No such file")
        terminal.type("/exit\r")
        assert terminal.end() == (0, None)
    content = json.loads(file.read_text())
    assert content["model"] == str(tiny)
    assert [m["role"] for m in content["messages"]] == ["system", "user", "assistant"]
    assert content["params"]["temperature"] == 0
    assert content["params"]["stop"] == ["END"]
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with Terminal("run", tiny, "--max-tokens", 3, columns=200) as terminal:
        terminal.prompt(1)
        terminal.type(f"/load {tmp_path}/none.json\r")
        terminal.until("none.json cannot be read: No such file")
        terminal.type(f"/load {broken}\r")
        terminal.until("is not JSON")
        terminal.type(f"/load {file}\r")
        terminal.until("loaded 3 messages")
        terminal.type("/system\r")
        terminal.until("system prompt: Be kind.")
        terminal.type("/set temperature\r")
        terminal.until("temperature is 0")
        terminal.type("go on\r")
        terminal.until(", answer 3 tokens")
        terminal.type(f"/save -f '{file}'\r")
        terminal.until("saved 5 messages")
    assert asked(file) == ["hello", "go on"]


def test_history_stays_for_later_chats(tiny: Path, home: Path) -> None:
    def chat(*options: str, keys: str) -> str:
        with Terminal("run", tiny, "--max-tokens", 2, *options) as terminal:
            terminal.prompt(1)
            terminal.type(keys)
            shown = terminal.prompt(2)
            terminal.type("\x04")
            assert terminal.end() == (0, None)
            return shown

    chat(keys='"""remember\rme"""\r')
    chat("--no-history", keys="a secret\r")
    file = home / "history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "secret" not in file.read_text()
    assert '> """remember\n  me"""' in chat(keys="\x1b[A\r")  # the key "up"
    assert "a secret" not in chat("--no-history", keys="\x1b[Asomething else\r")
    assert '> """remember' in chat(keys="\x12rememb\r\r")  # Ctrl-R searches
    with Terminal("run", tiny, "--max-tokens", 2) as terminal:
        terminal.prompt(1)
        terminal.type("/set history off\r")
        terminal.prompt(2)
        terminal.type("another secret\r")
        terminal.prompt(3)
    assert "another secret" not in file.read_text()


def test_a_history_that_cannot_be_kept_is_told_once(tiny: Path, home: Path) -> None:
    (home / "history").mkdir(parents=True)
    with Terminal("run", tiny, "--max-tokens", 2) as terminal:
        terminal.prompt(1)
        terminal.type("hello\r")
        terminal.until(", answer 2 tokens")
        terminal.type("again\r")
        shown = terminal.until(", answer 2 tokens", 2)
    assert shown.count("no history is kept") == 1


def test_a_full_context_forgets_the_oldest_turns(tiny: Path) -> None:
    options = ("--context", 300, "--max-tokens", 20, "--temperature", 0)
    with Terminal("run", tiny, "--system", "S", *options) as terminal:
        terminal.prompt(1)
        for count in range(2, 6):
            terminal.type("x" * 60 + "\r")
            terminal.prompt(count)
        shown = terminal.text
        assert "the context of 300 tokens is full: the oldest" in shown
        assert "error" not in shown
        terminal.type("y" * 400 + "\r")
        shown = terminal.prompt(6)
        assert "error: the message makes a prompt of 4" in shown
        assert "--context of up to 2048" in " ".join(shown.split())
        terminal.type("z" * 200 + "\r/set max_tokens none\r/retry\r")
        shown = terminal.prompt(9)
        assert "the answer reached the end of the context, 300 tokens" in " ".join(shown.split())
        terminal.type("/exit\r")
        assert terminal.end() == (0, None)


MARKDOWN = """# Title

A **bold** word and `code`.

- one
- two

```python
print("a line of code that is longer than a narrow terminal")
```
"""


def test_markdown_on_a_terminal(tiny: Path, tmp_path: Path) -> None:
    command = scripted(MARKDOWN, tmp_path)
    for arguments in ((), ("hello",)):
        with Terminal("run", tiny, *arguments, command=command) as terminal:
            if not arguments:
                terminal.prompt(1)
                terminal.type("hello\r")
            shown = terminal.until("tokens/s")
        assert "\nTitle\n\nA bold word and code.\n\n• one\n• two\n\nprint(" in f"\n{shown}"
        assert "\x1b[1mbold\x1b[0m" in terminal.raw
    with Terminal("run", tiny, "hello", "--no-markdown", command=command) as terminal:
        assert "# Title\n\nA **bold** word" in terminal.until("tokens/s")


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_without_colour(tiny: Path, tmp_path: Path, env: dict[str, str]) -> None:
    file = tmp_path / "chat.json"
    command = scripted(MARKDOWN, tmp_path)
    with Terminal("run", tiny, command=command, env=env) as terminal:
        terminal.prompt(1)
        terminal.type("hello\r")
        shown = terminal.prompt(2)
        terminal.type(f'"""one\rtwo"""\r/save {file}\r')
        terminal.until("saved")
        terminal.type("\x04")
        assert terminal.end() == (0, None)
    assert "# Title\n\nA **bold** word" in shown
    assert '\nprint("a line' in shown
    colours = [s for s in terminal.raw.split("\x1b[") if s[:2] in ("31", "35", "36", "1m", "2m")]
    assert colours == []
    if env.get("TERM") == "dumb":
        assert "\x1b" not in terminal.raw.partition("leaves")[2]
    assert asked(file) == ["hello", "one\ntwo"]


def test_a_dumb_terminal_hints_and_leaves_too(tiny: Path) -> None:
    with Terminal("run", tiny, "--max-tokens", 2, env={"TERM": "dumb"}) as terminal:
        terminal.prompt(1)
        terminal.type("\x03")
        terminal.until(TWICE)
        terminal.prompt(2)
        terminal.type("\x03")
        assert terminal.end() == (0, None)


@pytest.mark.parametrize("columns", [60, 200])
def test_words_stay_whole(tiny: Path, tmp_path: Path, columns: int) -> None:
    words = " ".join(f"word{number}" for number in range(100))
    wide = "这是一个很长的中文句子，" * 20
    with Terminal(
        "run", tiny, "hello", columns=columns, command=scripted(f"{words}\n\n{wide}", tmp_path)
    ) as terminal:
        shown = terminal.until("tokens/s")
    first, second = shown.split("\n\n")
    assert " ".join(first.split("\n")) == words
    chinese = "".join(second.split("\nprompt")[0].split("\n"))
    assert chinese.replace(" ", "") == wide  # pyte puts a blank behind each wide character
    assert not any(line.startswith("，") for line in second.split("\n"))


def test_a_terminal_that_changes_its_size_in_the_middle(tiny: Path, tmp_path: Path) -> None:
    words = [f"word{number}" for number in range(60)]
    text = f"{' '.join(words[:30])}\x1a {' '.join(words[30:])}"
    with Terminal("run", tiny, command=scripted(text, tmp_path), columns=100) as terminal:
        terminal.prompt(1)
        terminal.type("hello\r")
        terminal.until("word28")
        terminal.resize(140)
        go_on(tmp_path)
        terminal.until("word59")
        shown = terminal.prompt(2)
        lines = [line for line in terminal.lines if line.startswith("word")]
        assert " ".join(shown.split("hello\n")[1].split("\nprompt")[0].split()) == " ".join(words)
        assert max(map(len, lines)) > 100
        terminal.type("again\r")
        terminal.until("word28", 2)
        terminal.resize(60)
        go_on(tmp_path)
        terminal.until("word59", 2)
    written = terminal.raw.replace("\r\n", " ")
    assert written.count(" ".join(words)) == 2


def test_a_model_cannot_command_the_terminal(tiny: Path, tmp_path: Path) -> None:
    command = scripted("a\x1b[2J\x1b]0;title\x07b\x9b31mc", tmp_path)
    for options in ((), ("--no-markdown",)):
        with Terminal("run", tiny, "hello", *options, command=command) as terminal:
            terminal.until("a[2J]0;titleb31mc")
        assert "\x1b[2J" not in terminal.raw
        assert "\x07" not in terminal.raw


def test_piped_answers_are_the_models_bytes(tiny: Path, tmp_path: Path) -> None:
    import subprocess

    command = scripted(MARKDOWN + "\x1b[1m **x", tmp_path)
    done = subprocess.run(
        [*command, "run", str(tiny), "hello"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.decode() == MARKDOWN + "\x1b[1m **x\n"


def test_the_editor_is_imported_for_chats_alone(tiny: Path) -> None:
    probe = (
        "import sys; from sartor.cli.main import guarded; "
        "guarded(sys.argv[1:]); "
        "print('imported', *sorted({m.partition('.')[0] for m in sys.modules} & "
        "{'prompt_toolkit', 'pygments', 'markdown_it', 'asyncio'}), 'and no more')"
    )
    command = [COMMAND[0], "-c", probe]
    with Terminal("run", tiny, "hello", "--max-tokens", 1, command=command) as terminal:
        terminal.until("and no more")
        assert "prompt_toolkit" not in terminal.text
    with Terminal(
        "run", tiny, "hello", "--max-tokens", 1, "--no-markdown", command=command
    ) as terminal:
        terminal.until("imported and no more")
