"""What the shells offer: candidates, and the scripts in the shells that are installed here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sartor.cli.app import _COMMANDS
from sartor.cli.candidates import candidates
from sartor.cli.main import guarded
from sartor.store import default_catalogue

Capture = pytest.CaptureFixture[str]


def offered(*words: str) -> list[str]:
    return [candidate.text for candidate in candidates(list(words))]


def test_commands_and_their_first_letters() -> None:
    visible = {name for name in _COMMANDS if not name.startswith("_")}
    assert set(offered("")) == visible
    assert offered("ru") == ["run"]
    assert offered("nothing-like-it") == []
    assert {"--version", "--debug", "--help"} <= set(offered("--"))
    assert set(offered("--debug", "")) == visible


@pytest.mark.parametrize("name", [n for n in _COMMANDS if n != "keys" and n[0] != "_"])
def test_options_of_every_command_are_those_of_its_help(name: str, capsys: Capture) -> None:
    assert guarded([name, "--help"]) == 0
    shown = capsys.readouterr().out
    found = offered(name, "--")
    assert "--help" in found
    for option in found:
        assert f"{option} " in shown or f"{option}\n" in shown, option


def test_commands_of_a_group() -> None:
    assert {"add", "list", "revoke"} <= set(offered("keys", ""))
    assert "--share" in offered("keys", "add", "--s")
    assert offered("keys", "add", "") == [":files"]


def test_models_are_those_of_the_catalogue_and_the_store(home: Path) -> None:
    names = offered("run", "")
    assert {"smollm2:135m", "hf:", "pypi:", ":files"} <= set(names)
    assert set(default_catalogue().entries) <= set(names)
    assert set(offered("run", "smollm2:")) == {
        *(name for name in default_catalogue().entries if name.startswith("smollm2:")),
        ":files",
    }
    assert offered("rm", "") == []  # nothing is stored here
    assert "smollm2:135m" in offered("pull", "gemma3:1b", "smol")  # it takes several


def test_stored_models_are_offered_to_rm(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sartor.store import ModelStore

    class Stored:
        name = "hf:somebody/something"

    monkeypatch.setattr(ModelStore, "list", lambda _: [Stored])
    assert offered("rm", "") == ["hf:somebody/something"]
    assert "hf:somebody/something" in offered("run", "hf:")


def test_values_of_options() -> None:
    assert offered("run", "m", "--kv", "") == ["bf16", "fp16", "fp32", "int8"]
    assert offered("run", "--kv=fp", "")[-1] == ":files"  # the next word is the model
    assert offered("run", "--kv=fp") == ["--kv=fp16", "--kv=fp32"]
    assert offered("serve", "m", "--log", "j") == ["json"]
    assert "cpu" in offered("run", "m", "--backend", "")
    assert offered("run", "m", "--adapter", "") == [":files"]
    assert offered("run", "m", "--threads", "") == []
    assert offered("completion", "") == ["bash", "zsh", "fish"]


def test_where_nothing_is_known_nothing_is_offered() -> None:
    assert offered("run", "smollm2:135m", "") == []  # the prompt
    assert offered("run", "smollm2:135m", "a prompt", "") == []
    assert offered("run", "--", "--k") == [":files"]  # an argument now
    assert offered("unknown", "") == []


def test_shells_that_are_not_known_are_refused(capsys: Capture) -> None:
    assert guarded(["completion", "tcsh"]) == 2
    assert "bash" in capsys.readouterr().err


# In the shells themselves ----------------------------------------------------------------


@pytest.fixture
def sartor(tmp_path: Path) -> Path:
    program = tmp_path / "bin" / "sartor"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -c "from sartor.cli.main import main; main()" "$@"\n'
    )
    program.chmod(0o755)
    return program


def in_shell(shell: str, sartor: Path, script: str) -> list[str]:
    """The lines that a script prints in a shell that has read Sartor's script."""
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    source = sartor.with_name(f"completion.{shell}")
    written = subprocess.run([sartor, "completion", shell], capture_output=True, text=True)
    assert (written.returncode, written.stderr) == (0, "")
    source.write_text(written.stdout)
    plain = {"bash": ["--norc", "--noprofile"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    done = subprocess.run(
        [program, *plain, "-c", script.format(source=source, sartor=sartor)],
        capture_output=True,
        text=True,
        cwd=sartor.parent,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


BASH = """
source {source}
COMP_LINE="{sartor} {line}"; COMP_POINT=${{#COMP_LINE}}
compopt() {{ :; }}  # works in a completion only
_sartor
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def bash(sartor: Path, line: str) -> list[str]:
    return in_shell("bash", sartor, BASH.replace("{line}", line))


def test_bash(sartor: Path) -> None:
    assert bash(sartor, "ru") == ["run"]
    assert bash(sartor, "run smollm2:1") == ["135m"]  # what stands behind the colon for bash
    assert bash(sartor, "run completion.b") == ["completion.bash"]  # a file of this folder
    assert bash(sartor, "run m --kv ") == ["bf16", "fp16", "fp32", "int8"]
    assert bash(sartor, "run m --kv=fp") == ["fp16", "fp32"]
    assert bash(sartor, "keys a") == ["add"]


def test_zsh(sartor: Path) -> None:
    script = """
compdef() {{ [[ "$1 $2" == "_sartor sartor" ]] || print wrong }}
_describe() {{ print -rl -- "${{(@)found%%:[A-Z]*}}" }}
_files() {{ print files }}
source {source}
words=({sartor} run smollm2:1); CURRENT=3
_sartor
words=({sartor} ru); CURRENT=2
_sartor
words=({sartor} run ''); words[3]=--ke; CURRENT=3
_sartor
"""
    assert in_shell("zsh", sartor, script) == ["smollm2\\:135m", "files", "run"]


def test_fish(sartor: Path) -> None:
    script = "set -p PATH {sartor}/..; source {source}; set -p PATH (dirname {sartor}); "
    found = in_shell("fish", sartor, script + 'complete -C "sartor run smollm2:1"')
    assert [line.partition("\t")[0] for line in found] == ["smollm2:135m"]
    found = in_shell("fish", sartor, script + 'complete -C "sartor ke"')
    assert [line.partition("\t")[0] for line in found] == ["keys"]
    found = in_shell("fish", sartor, script + 'complete -C "sartor run completion.f"')
    assert found == ["completion.fish"]
