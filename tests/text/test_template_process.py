"""Templates from strangers: what they take is limited, whatever they do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sartor.errors import FormatError, UsageError
from sartor.text import template_process
from sartor.text.content_shape import TemplateStopped
from sartor.text.template_process import TemplateProcess

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CASES: Any = {"messages": [{"role": "user", "content": "grüße 🙂 \ud800"}]}


def pid_of(process: TemplateProcess) -> int:
    assert process._process is not None
    return process._process.pid


@pytest.fixture
def chat() -> Iterator[TemplateProcess]:
    process = TemplateProcess()
    yield process
    process.close()


def test_it_writes_what_the_template_says(chat: TemplateProcess) -> None:
    assert chat.render(CHAT, CASES) == "<user>grüße 🙂 \ud800"
    first = pid_of(chat)
    assert chat.render(CHAT, CASES) == "<user>grüße 🙂 \ud800"
    assert pid_of(chat) == first
    long = {"messages": [{"role": "user", "content": "word " * 1_600_000}]}
    assert len(chat.render(CHAT, long)) == len("<user>") + 8_000_000


def test_threads_get_their_own_answers(chat: TemplateProcess) -> None:
    found: dict[int, str] = {}

    def ask(i: int) -> None:
        for _ in range(50):
            found[i] = chat.render(CHAT, {"messages": [{"role": "user", "content": str(i)}]})

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: f"<user>{i}" for i in range(8)}


HOSTILE = {
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "a call block": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 40
    + "x"
    + "{% endcall %}" * 40,
    "ljust": "{{ 'x'.ljust(1500000000)|length }}",
    "ljust, not run": "{% if false %}{{ 'x'.ljust(1500000000)|length }}{% endif %}{{ 'x' * 20000000 }}",
    "format": "{{ '{:1500000000}'.format(1)|length }}",
    "format as a filter": "{{ '%1500000000d'|format(1)|length }}",
    "percent": "{{ ('%1500000000d' % 1)|length }}",
    "maps": "{{ range(90000)|map('string')|map('center', 100000)|join|length }}",
    "indentation": "{{ [[[[[[[1]]]]]]]|tojson(indent=300000000)|length }}",
    "center": "{{ 'x'|center(2000000000)|length }}",
    "a filter that repeats": "{{ (('x'|center(100000))|list)|batch(1)|list|string|length }}" * 300,
    "replace": "{{ ('a' * 100000)|replace('a', 'b' * 100000)|length }}",
    "join": "{{ range(99999)|join('x' * 100000)|length }}",
    "a product of numbers": "{% set ns = namespace(x=3) %}{% for i in range(99) %}"
    "{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "sorting": "{{ range(99999)|map('string')|sort|unique|list|length }}" * 300,
    "no end of words": "{{ ('a ' * 10000000)|wordwrap(1)|length }}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{{ a }}{% endfor %}{% endfor %}",
    "output": "{% for a in range(99999) %}" + "x" * 1000 + "{% endfor %}",
    "a long source": "{{ 1 }}" * 9000 + "{{ 'x' * 99999999 }}",
    "a deep source": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "a deep expression": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a sum without end": "{{ " + "+".join(["1"] * 30000) + " }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_template_takes_is_limited(name: str) -> None:
    """It ends with an error or with a short text; the process never has more than its memory."""
    process = TemplateProcess()
    process.start()
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            running = process._process
            if running is not None:
                peak = max(peak, resident(running.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    before = cpu_of_children()
    try:
        text = process.render(HOSTILE[name], {"messages": []})
    except (UsageError, FormatError) as error:
        text = str(error)
    finally:
        done.set()
        watcher.join()
    assert len(text) < 10_000
    assert "\n" not in text
    assert peak < 300 << 20
    assert process.render(CHAT, CASES) == "<user>grüße 🙂 \ud800"
    process.close()
    assert cpu_of_children() - before < template_process.CPU_SECONDS + 1.0


def resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    except (OSError, IndexError):
        return 0


def cpu_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def test_errors_keep_their_kind() -> None:
    process = TemplateProcess()
    for ask in (process.check, lambda source: process.render(source, {})):
        with pytest.raises(FormatError, match="syntax error in line 1"):
            ask("{% if")
    with pytest.raises(UsageError, match="refuses these messages: no tools") as refused:
        process.render("{{ raise_exception('no tools') }}", {})
    assert not isinstance(refused.value, TemplateStopped)
    with pytest.raises(TemplateStopped, match="__class__"):
        process.render("{{ ''.__class__ }}", {})
    process.check("{{ raise_exception('no tools') }}")
    process.close()


def test_a_killed_process_is_replaced(chat: TemplateProcess) -> None:
    chat.render(CHAT, CASES)
    os.kill(pid_of(chat), signal.SIGKILL)
    time.sleep(0.1)
    assert chat.render(CHAT, CASES) == "<user>grüße 🙂 \ud800"


def test_a_death_in_the_midst_is_an_error_of_that_call() -> None:
    process = TemplateProcess()
    endless = "{% for a in range(99999) %}{{ range(9999)|sum }}{% endfor %}"
    process.render(CHAT, CASES)
    timer = threading.Timer(0.2, os.kill, (pid_of(process), signal.SIGKILL))
    timer.start()
    with pytest.raises(UsageError, match="was stopped: its process ended with signal 9"):
        process.render(endless, {})
    assert process.render(CHAT, CASES) == "<user>grüße 🙂 \ud800"
    process.close()


def test_one_that_waits_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no processor time: the clock on the wall ends it."""
    monkeypatch.setattr(template_process, "_PATIENCE", 0.5)
    process = TemplateProcess()
    process.render(CHAT, CASES)
    os.kill(pid_of(process), signal.SIGSTOP)
    with pytest.raises(UsageError, match=r"takes more than 0\.5 s"):
        process.render(CHAT, CASES)
    monkeypatch.undo()
    assert process.render(CHAT, CASES) == "<user>grüße 🙂 \ud800"
    process.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_holds_no_secrets_and_opens_nothing(
    chat: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    chat.close()
    chat.render(CHAT, CASES)
    place = Path("/proc") / str(pid_of(chat))
    assert b"hf_secret" not in (place / "environ").read_bytes()
    assert b"hf_secret" not in (place / "cmdline").read_bytes()
    limits = (place / "limits").read_text()
    for name, most in (("Max open files", "3"), ("Max file size", "0"), ("Max processes", "0")):
        line = next(line for line in limits.splitlines() if line.startswith(name))
        assert line.removeprefix(name).split()[:2] == [most, most]
    assert len(list((place / "fd").iterdir())) == 3


def test_it_ends_with_its_owner(tmp_path: Path) -> None:
    """Also where the owner had no time to say so."""
    script = (
        "import os, signal; from sartor.text.template_process import TemplateProcess\n"
        "p = TemplateProcess(); p.render('x', {}); print(p._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_an_unused_one_leaves_no_process() -> None:
    process = TemplateProcess()
    process.render(CHAT, CASES)
    running = process._process
    assert running is not None
    del process
    assert running.poll() is not None


@pytest.mark.skipif(sys.platform == "win32", reason="it stays there")
def test_one_without_work_ends_and_the_next_call_starts_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(template_process, "IDLE_SECONDS", 0.3)
    process = TemplateProcess()
    answers = set()
    pids = set()
    for pause in (0.0, 0.1, 0.28, 0.29, 0.3, 0.3, 0.31, 0.6):
        time.sleep(pause)
        answers.add(process.render(CHAT, CASES))
        pids.add(pid_of(process))
    assert answers == {"<user>grüße 🙂 \ud800"}
    assert len(pids) > 1
    running = process._process
    assert running is not None
    assert running.wait(5) == 0
    process.close()
