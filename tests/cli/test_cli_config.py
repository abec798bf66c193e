"""Settings: which value counts, what is refused, and what ``sartor config`` shows."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_tiny_model

from sartor.cli import serve as serve_module
from sartor.cli.app import command_line, take_config
from sartor.cli.main import guarded
from sartor.cli.settings import config_path, leaves, options_of
from sartor.errors import UsageError
from sartor.graph import sampling_in_effect

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file for settings, which nothing is in yet."""
    path = tmp_path / "settings.toml"
    path.write_text("")
    monkeypatch.setenv("SARTOR_CONFIG", str(path))
    return path


def run(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    code = guarded([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def fails(capsys: Capture, *arguments: object) -> str:
    code, out, err = run(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    return err


def answer(capsys: Capture, *arguments: object) -> dict[str, Any]:
    code, out, err = run(capsys, "run", *arguments, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def config(capsys: Capture, *arguments: object) -> dict[tuple[str, str], tuple[Any, str]]:
    """Value and origin by command and key."""
    _, out, _ = run(capsys, *arguments, "config", "--json")
    return {(v["command"], v["key"]): (v["value"], v["from"]) for v in json.loads(out)["values"]}


# Which value counts


def test_the_nearest_value_counts(
    capsys: Capture, tiny: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = (tiny, "hello", "--temperature", 0, "--stop", "\0none")

    def tokens(*more: object) -> int:
        count: int = answer(capsys, *ask, *more)["completion_tokens"]
        return count

    file.write_text("max_tokens = 3")
    assert tokens() == 3
    file.write_text("max_tokens = 3\n[run]\nmax-tokens = 4")  # as on the command line
    assert tokens() == 4
    monkeypatch.setenv("SARTOR_MAX_TOKENS", "5")
    assert tokens() == 5
    monkeypatch.setenv("SARTOR_RUN_MAX_TOKENS", "6")
    assert tokens() == 6
    assert tokens("--max-tokens", 7) == 7
    monkeypatch.setenv("SARTOR_RUN_MAX_TOKENS", "")  # as if it were not set
    assert tokens() == 5


def test_the_file_is_the_option_s_or_the_variable_s(
    capsys: Capture, tiny: Path, file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.toml"
    other.write_text("[run]\nmax_tokens = 2")
    file.write_text("[run]\nmax_tokens = 3")
    for arguments in (
        ("--config", other, "run", tiny, "hi"),
        ("run", tiny, "hi", f"--config={other}"),
        ("run", "--config", other, tiny, "hi"),
    ):
        code, out, _ = run(capsys, *arguments, "--json", "--temperature", 0)
        assert (code, json.loads(out)["completion_tokens"]) == (0, 2)
    assert take_config(["run", "m", "--", "--config"]) == (None, ["run", "m", "--", "--config"])
    with pytest.raises(UsageError, match="--config needs"):
        take_config(["run", "--config"])


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"XDG_CONFIG_HOME": "/x"}, "/x/sartor/sartor.toml"),
        ("linux", {"XDG_CONFIG_HOME": ""}, "~/.config/sartor/sartor.toml"),
        ("darwin", {}, "~/Library/Application Support/sartor/sartor.toml"),
        ("win32", {"APPDATA": "/roaming"}, "/roaming/sartor/sartor.toml"),
        ("linux", {"SARTOR_CONFIG": "~/mine.toml"}, "~/mine.toml"),
    ],
)
def test_where_the_file_is(
    monkeypatch: pytest.MonkeyPatch, platform: str, variables: dict[str, str], expected: str
) -> None:
    monkeypatch.delenv("SARTOR_CONFIG")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert config_path() == Path(os.path.expanduser(expected))


def test_every_kind_of_option_can_be_set(
    capsys: Capture, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(
        '[serve]\nport = 0\nmax_wait = 2\ntune = false\notel = false\nlog = "json"\n'
        'keys = "keys.toml"\nallowed_host = ["box"]\ncors_origin = ["https://a", "https://b"]\nmemory = "3GB"\n'
        "[keys.add]\nshare = 2\n"
    )
    seen: dict[str, Any] = {}

    def note(models: list[str], **more: Any) -> int:
        seen.update(more, models=models)
        return 0

    monkeypatch.setattr("sartor.serving.server.serve", note)
    assert run(capsys, "serve", "m")[0] == 0
    assert (seen["port"], seen["max_wait"], seen["plan"].tune) == (0, 2, False)
    assert seen["keys"] == tmp_path / "keys.toml"  # beside the file
    assert list(seen["cors_origins"]) == ["https://a", "https://b"]
    assert list(seen["allowed_hosts"]) == ["box"]
    assert (seen["telemetry"].log, seen["memory_bytes"]) == ("json", 3 * 10**9)
    monkeypatch.setenv("SARTOR_SERVE_CORS_ORIGIN", '["https://c", "https://d"]')
    monkeypatch.setenv("SARTOR_TUNE", "1")
    monkeypatch.setenv("SARTOR_SERVE_KEYS", "keys.toml")
    assert run(capsys, "serve", "m", "--port", 5)[0] == 0
    assert list(seen["cors_origins"]) == ["https://c", "https://d"]
    assert (seen["port"], seen["plan"].tune, seen["keys"]) == (5, True, Path("keys.toml"))
    monkeypatch.setenv("SARTOR_SERVE_CORS_ORIGIN", "https://c")
    assert run(capsys, "serve", "m", "--cors-origin", "https://e")[0] == 0
    assert list(seen["cors_origins"]) == ["https://e"]
    keys = tmp_path / "new.toml"
    assert run(capsys, "keys", "add", keys, "alice")[0] == 0
    assert "share = 2" in keys.read_text()


def test_help_shows_what_is_built_in(capsys: Capture, file: Path) -> None:
    file.write_text("[run]\nmax_tokens = 77\n")
    code, out, err = run(capsys, "run", "--help")
    assert (code, err) == (0, "")
    assert "1024" in out
    assert "77" not in out
    for broken in ("a = = 1", "[run]\nx = 1", "[run]\nmax_tokens = true"):
        file.write_text(broken)
        assert run(capsys, "run", "--help") == (0, out, "")


def test_help_of_sampling_says_the_documented_default() -> None:
    (command,) = [c for names, c in leaves(command_line("")) if names == ("run",)]
    told = {o.key: o.parameter.show_default for o in options_of(command)}
    for name, (value, _) in sampling_in_effect().items():
        assert told[name] == f"the model's own, else {value:g}"


# What is refused


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a = = 1", "no valid TOML"),
        ("\N{DEGREE SIGN}", "no valid TOML"),
        ("thread = 1", "thread: no command has such an option; did you mean threads?"),
        ("[srve]\nseed = 1", "[srve]: there is no such command; did you mean serve?"),
        ("[run]\nmax_token = 1", "[run] max_token: `sartor run` has no such option; did you mean"),
        ("[run.seed]\na = 1", "[run] seed: `sartor run` has no such option"),
        ("[keys]\nshare = 1", "[keys] share: write it into one of [keys.add]"),
        ("[keys.ad]\nshare = 1", "[keys.ad]: there is no such command; did you mean add?"),
        ("[run]\nthreads = 1.5", "[run] threads is 1.5; it must be a whole number"),
        ("threads = true", "threads is true; it must be a whole number"),
        ('threads = "2"', "threads is '2'; it must be a whole number"),
        ('[run]\ntemperature = "hot"', "[run] temperature is 'hot'; it must be a number"),
        ("[run]\nsystem = 3", "[run] system is 3; it must be a string"),
        ('[run]\nraw = "yes"', "[run] raw is 'yes'; it must be true or false"),
        ('[run]\nstop = "a"', "[run] stop is 'a'; it must be a list of strings"),
        ("[run]\nstop = [1]", "[run] stop is 1; it must be a list of strings"),
        (
            "[run]\ntop_p = 7",
            "--top-p is 7.0; it must be a number from 0 to 1 (--top-p is set by [run]",
        ),
    ],
)
def test_what_is_wrong_in_the_file_is_named(
    capsys: Capture, tiny: Path, file: Path, content: str, said: str
) -> None:
    file.write_text(content, encoding="utf-8")
    err = fails(capsys, "run", tiny, "hi")
    assert said in err
    assert str(file) in err


def test_other_commands_sections_are_for_them(capsys: Capture, tiny: Path, file: Path) -> None:
    file.write_text('[serve]\nprot = 1\nport = "x"\n[run]\nmax_tokens = 1\n')
    assert answer(capsys, tiny, "hi")["completion_tokens"] == 1
    assert "[serve] prot" in fails(capsys, "serve", tiny)
    file.write_text("[serve]\nport = 1\nmax_requests = 0\n")
    assert "[serve] max_requests: 0 is not in the range" in fails(capsys, "serve", tiny)
    file.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in fails(capsys, "run", tiny, "hi")
    assert "no such file" in fails(capsys, "run", tiny, "hi", "--config", file.with_name("none"))
    assert "cannot be read" in fails(capsys, "run", tiny, "hi", "--config", file.parent)


def test_variables_that_are_wrong_or_unknown(
    capsys: Capture, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SARTOR_THREADS", "four")
    assert "SARTOR_THREADS: 'four' is not a valid int" in fails(capsys, "run", tiny, "hi")
    monkeypatch.setenv("SARTOR_THREADS", "1")
    monkeypatch.setenv("SARTOR_TEMPERATURE", "-1")
    assert "(--temperature is set by SARTOR_TEMPERATURE)" in fails(capsys, "run", tiny, "hi")
    monkeypatch.delenv("SARTOR_TEMPERATURE")
    monkeypatch.setenv("SARTOR_TREADS", "1")
    monkeypatch.setenv("SARTOR_TEST_ANYTHING", "1")  # of the project's tests
    code, _, err = run(capsys, "run", tiny, "hi", "--max-tokens", 1)
    assert code == 0
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "SARTOR_TREADS is not known; did you mean SARTOR_THREADS" in warnings[0]


# Presets


def test_a_preset_is_a_system_prompt_and_sampling(
    capsys: Capture, tiny: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text('[presets.calm]\nsystem = "Be calm."\ntemperature = 0\n[run]\nmax_tokens = 4\n')
    plain = answer(capsys, tiny, "hi")
    calm = answer(capsys, tiny, "hi", "--preset", "calm")
    by_hand = answer(capsys, tiny, "hi", "--system", "Be calm.", "--temperature", 0)
    assert calm["prompt_tokens"] == by_hand["prompt_tokens"] > plain["prompt_tokens"]
    assert calm["text"] == by_hand["text"]
    assert calm["sampling"]["temperature"] == {"value": 0, "from": "preset calm"}
    other = answer(capsys, tiny, "hi", "--preset", "calm", "--system", "", "--temperature", 1)
    assert other["prompt_tokens"] < calm["prompt_tokens"]
    assert other["sampling"]["temperature"] == {"value": 1, "from": "option"}

    # Chosen by name, it comes before what the file says for all; a variable comes before it.
    file.write_text(file.read_text() + "temperature = 0.4\ntop_p = 0.5\n")
    found = answer(capsys, tiny, "hi", "--preset", "calm")["sampling"]
    assert found["temperature"]["value"] == 0
    assert found["top_p"] == {"value": 0.5, "from": "sartor.toml"}
    monkeypatch.setenv("SARTOR_RUN_TEMPERATURE", "0.9")
    found = answer(capsys, tiny, "hi", "--preset", "calm")["sampling"]
    assert found["temperature"]["value"] == 0.9


def test_a_preset_stands_for_its_model(capsys: Capture, tiny: Path, file: Path) -> None:
    text = f"[presets.pal]\nmodel = {json.dumps(str(tiny))}\ntemperature = 0\n"
    file.write_text(text + '[presets.bare]\nsystem = "x"\n')
    assert answer(capsys, "pal", "hi", "--max-tokens", 2)["model"] == str(tiny)
    err = fails(capsys, "run", "bare", "hi")
    assert "the preset bare names no model" in err
    assert "there is no preset 'pat'; there are pal, bare" in fails(
        capsys, "run", tiny, "hi", "--preset", "pat"
    )
    # Beside the file, wherever the command runs.
    near = tiny.parent / "near.toml"
    near.write_text(f'[presets.pal]\nmodel = "./{tiny.name}"\n')
    assert answer(capsys, "pal", "hi", "--max-tokens", 1, "--config", near)["model"] == str(tiny)


def test_the_template_s_variables(capsys: Capture, file: Path, tmp_path: Path) -> None:
    path = write_tiny_model(
        tmp_path / "m.gguf", template="{{ 'x' * (length or 1) }}{{ messages[0].content }}"
    )
    file.write_text("[presets.long]\ntemplate = { length = 40 }\n")
    short = answer(capsys, path, "hi", "--max-tokens", 1)["prompt_tokens"]
    long = answer(capsys, path, "hi", "--max-tokens", 1, "--preset", "long")["prompt_tokens"]
    assert long == short + 39


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("systm = 'x'", "systm: a preset has no such key; did you mean system?"),
        ("max_tokens = 3", "max_tokens: a preset has no such key; it may have "),
        ("system = 3", "system is 3; it must be a string"),
        ("model = ''", "model is empty"),
        ("top_k = 1.5", "top_k is 1.5; it must be a whole number"),
        ("temperature = 'x'", "temperature is 'x'; it must be a number"),
        ("template = 'x'", "template is 'x'; it must be a table"),
        ("template = { messages = 1 }", "template: messages cannot be set here"),
    ],
)
def test_wrong_presets_are_named(
    capsys: Capture, tiny: Path, file: Path, content: str, said: str
) -> None:
    file.write_text(f"[presets.p]\n{content}\n")
    err = fails(capsys, "run", tiny, "hi", "--preset", "p")
    assert f"{file}: [presets.p] {said}" in err
    assert answer(capsys, tiny, "hi", "--max-tokens", 1)  # nobody asked for it


def test_serve_takes_presets(
    capsys: Capture, tiny: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def note(models: list[str], **more: Any) -> int:
        seen.update(more, models=models)
        return 0

    monkeypatch.setattr("sartor.serving.server.serve", note)
    model = json.dumps(str(tiny))
    file.write_text(f"[presets.a]\nmodel = {model}\n[presets.b]\nmodel = {model}\n[presets.c]\n")

    def served(*arguments: object) -> tuple[list[str], list[str]]:
        assert run(capsys, "serve", *arguments)[0] == 0
        return seen["models"], [preset.name for preset in seen["presets"]]

    assert served(tiny) == ([str(tiny)], [])
    assert served("a", "b") == ([str(tiny)], ["a", "b"])
    assert served(tiny, "--preset", "c", "--preset", "a") == ([str(tiny)], ["c", "a"])
    file.write_text(file.read_text() + '[serve]\npreset = ["c"]\n')
    assert served(tiny) == ([str(tiny)], ["c"])
    assert "no preset 'd'" in fails(capsys, "serve", tiny, "--preset", "d")


# What is shown


def test_config_shows_each_value_and_where_it_is_from(
    capsys: Capture, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("threads = 2\n[serve]\nport = 9\nthreads = 3\n[presets.p]\nmodel = 'm'\n")
    monkeypatch.setenv("SARTOR_CONTEXT", "64")
    monkeypatch.setenv("SARTOR_BENCH_CONTEXT", "32")
    found = config(capsys)
    assert found["run", "threads"] == (2, str(file))
    assert found["serve", "threads"] == (3, f"[serve] of {file}")
    assert found["serve", "port"] == (9, f"[serve] of {file}")
    assert found["run", "context"] == ("64", "SARTOR_CONTEXT")
    assert found["bench", "context"] == ("32", "SARTOR_BENCH_CONTEXT")
    assert found["run", "max_tokens"] == (1024, "default")
    assert found["run", "temperature"] == ("the model's own, else 0.7", "default")
    # Every option of every command.
    for names, command in leaves(command_line("")):
        for option in options_of(command):
            assert (" ".join(names), option.key) in found
    assert ("serve", "cors_origin") in found
    assert "port" in inspect.signature(serve_module.serve).parameters

    code, out, err = run(capsys, "config")
    assert (code, err) == (0, "")
    assert re.search(r"(?m)^port +9 +settings\.toml \[serve\] +serve$", out)
    assert re.search(r"(?m)^context +32 +SARTOR_BENCH_CONTEXT +bench$", out)
    assert re.search(r"(?m)^model +m$", out)
    assert run(capsys, "config", "path") == (0, f"{file}\n", "")


def test_config_says_what_is_wrong(
    capsys: Capture, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("[presets.p]\nx = 1\n[run]\nsed = 1\nthreads = 'x'\n[srve]\n")
    monkeypatch.setenv("SARTOR_TREADS", "1")
    code, out, err = run(capsys, "config")
    assert code == 2
    assert "max_tokens" in out  # and shows what there is
    for said in ("[presets.p] x", "[run] sed", "[run] threads is 'x'", "[srve]", "SARTOR_TREADS"):
        assert said in err
    file.write_text("a = ")
    code, out, err = run(capsys, "config", "--json")
    assert code == 2
    assert "no valid TOML" in json.loads(out)["problems"][0]
    assert run(capsys, "config", "path") == (0, f"{file}\n", "")


def test_secrets_are_not_shown(
    capsys: Capture, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert re.search(r"(?m)^HF_TOKEN +not set$", run(capsys, "config")[1])
    secrets = {
        "HF_TOKEN": "hf_abcdef",
        "MODELSCOPE_API_TOKEN": "ms-abcdef",
        "HTTPS_PROXY": "http://me:abcdef@proxy:1",
        "PIP_INDEX_URL": "https://abcdef@example.org/simple",
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=abcdef",
        "SARTOR_HF_TOKEN": "abcdef",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    file.write_text('hf_token = "abcdef"\n[serve]\ncors_origin = ["https://u:abcdef@x"]\n')
    for arguments in (("config",), ("config", "--json")):
        _, out, err = run(capsys, *arguments)
        assert "abcdef" not in out + err
        assert re.search(r'HF_TOKEN"?:? +"?set', out)
        assert "***@proxy:1" in out


def test_a_table_fits_the_terminal(file: Path) -> None:
    pytest.importorskip("pty")
    import fcntl
    import pty
    import struct
    import termios

    file.write_text('[run]\nsystem = "%s"\n' % ("long " * 50))
    for columns in (60, 200):
        leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        process = subprocess.Popen(
            [sys.executable, "-m", "sartor.cli.main", "config"],
            stdout=follower,
            env=environment,
        )
        os.close(follower)
        shown = b""
        while True:
            try:
                piece = os.read(leader, 65536)
            except OSError:
                break
            if not piece:
                break
            shown += piece
        os.close(leader)
        assert process.wait(30) == 0
        table = shown.decode().split("ENVIRONMENT")[0].splitlines()[1:]
        assert max(map(len, table)) <= columns
        assert any(line.startswith("system") for line in table)


def test_show_and_run_say_how_tokens_are_drawn(capsys: Capture, tmp_path: Path, tiny: Path) -> None:
    own = write_tiny_model(tmp_path / "own.gguf", sampling={"temp": 0.25, "top_p": 9.0})
    code, out, _ = run(capsys, "show", own)
    assert code == 0
    assert re.search(
        r"(?m)^sampling +temperature 0\.25 \(the file's .*top-p 0\.95 \(default\)$", out
    )
    assert "top_p is 9.0" in " ".join(out.split())
    found = answer(capsys, own, "hi", "--max-tokens", 1)["sampling"]
    assert found["temperature"]["value"] == 0.25
    assert found["top_p"] == {"value": 0.95, "from": "default"}
    assert "temperature 0.7, top-p 0.95 (default)" in run(capsys, "show", tiny)[1]
