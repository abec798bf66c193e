from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from store_standins import GGUF, Hub, Recorder

import sartor
from sartor.errors import CapacityError, SartorError, UsageError
from sartor.store import ModelStore, sartor_home

PULL = """
import sys
from sartor.store import ModelStore, Silent
class Out(Silent):
    def notice(self, text): print("notice", text, flush=True)
    def advance(self, n): print("bytes", n, flush=True)
print("done", ModelStore().pull(sys.argv[1], Out()).path, flush=True)
"""


def pulling(ref: str) -> subprocess.Popen[str]:
    source = str(Path(sartor.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", PULL, ref],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": source},
        # A shell that runs the tests in the background makes its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_bytes(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    count = 0
    for line in process.stdout:
        count += line.startswith("bytes") and line != "bytes 0\n"
        if count >= 3:
            return
    pytest.fail("the pull ended early")


@pytest.fixture
def slow_hub(hub: Hub) -> Hub:
    hub.repos["o/m"] = {"m.gguf": GGUF * 2}
    hub.pause = 0.02
    return hub


def test_two_processes_do_the_work_once(slow_hub: Hub) -> None:
    first = pulling("hf:o/m")
    wait_for_bytes(first)
    second = pulling("hf:o/m")
    outputs = [p.communicate(timeout=20)[0] for p in (first, second)]
    assert "another process is pulling hf:o/m; waiting" in outputs[1]
    assert "here already" in outputs[1]
    assert outputs[0].splitlines()[-1] == outputs[1].splitlines()[-1]
    assert len(slow_hub.ranges) == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_pull_shows_nothing_and_is_resumed(slow_hub: Hub, how: signal.Signals) -> None:
    process = pulling("hf:o/m")
    wait_for_bytes(process)
    with pytest.raises(SartorError, match="pulling"):
        ModelStore().remove("hf:o/m")
    process.send_signal(how)
    process.communicate(timeout=10)
    assert process.returncode != 0
    store = ModelStore()
    assert store.resolve("hf:o/m") is None
    assert store.list() == []
    slow_hub.pause = 0
    assert store.pull("hf:o/m").path.read_bytes() == GGUF * 2
    resumed = slow_hub.ranges[-1]
    assert resumed is not None
    assert int(resumed[6:-1]) > 0


def test_full_disk_is_one_clear_error(
    hub: Hub, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["o/m"] = {"m.gguf": GGUF}
    store = ModelStore()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CapacityError, match="the disk is full: hf:o/m does not fit"):
            store.pull("hf:o/m", recorder)
    assert not list((store.root / "staging").iterdir())
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
        with pytest.raises(CapacityError, match=r"2 MB needed, 0 MB free"):
            store.pull("hf:o/m", recorder)
    assert len(hub.ranges) == 1  # not even asked for the second time
    assert store.list() == []
    assert not recorder.open
    assert store.pull("hf:o/m").size_bytes == len(GGUF)


def test_an_unwritable_root_is_explained(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SartorError, match="SARTOR_HOME"):
        ModelStore(tmp_path / "file").pull("hf:o/m")


def test_list_and_remove(hub: Hub) -> None:
    hub.repos["o/b"] = {"m.gguf": GGUF}
    hub.repos["o/a"] = {"m.gguf": GGUF[:1000]}
    store = ModelStore()
    with pytest.raises(UsageError, match="not in the store"):
        store.remove("hf:o/a")
    for ref in ("hf:o/b", "hf:o/a"):
        store.pull(ref)
    with pytest.raises(UsageError, match="did you mean hf:o/"):
        store.remove("o/c")
    assert [m.name for m in store.list()] == ["hf:o/a", "hf:o/b"]
    old, new = (store.root / "staging" / n for n in ("old", "new"))
    for folder in (old, new, store.root / "staging" / "trash-1"):
        folder.mkdir()
        (folder / "m.part").write_bytes(b"1234")
    os.utime(old, (0, 0))
    assert store.remove("hf:o/b") >= len(GGUF) + 4
    assert [m.name for m in store.list()] == ["hf:o/a"]
    assert [p.name for p in (store.root / "staging").iterdir()] == ["new"]
    assert store.show("hf:o/a").stored is not None
    assert store.show("hf:o/b").stored is None


def test_a_damaged_model_is_not_shown_and_pulled_again(hub: Hub) -> None:
    hub.repos["o/m"] = {"m.gguf": GGUF}
    store = ModelStore()
    path = store.pull("hf:o/m").path
    path.write_bytes(b"short")
    assert store.resolve("hf:o/m") is None
    assert store.ensure("hf:o/m").path.read_bytes() == GGUF


def test_resolve_is_quick_and_lazy(hub: Hub, tmp_path: Path) -> None:
    hub.repos["o/m"] = {"m.gguf": GGUF}
    store = ModelStore()
    store.pull("hf:o/m")
    start = time.perf_counter()
    assert store.resolve("hf:o/m") is not None
    assert time.perf_counter() - start < 0.02
    code = (
        "import sys; from sartor.store import ModelStore; "
        "assert ModelStore().resolve('hf:o/m'); "
        "print([m for m in ('huggingface_hub', 'pip', 'httpx', 'filelock', 'numpy', 'torch', "
        "'urllib.request', 'email.parser') if m in sys.modules])"
    )
    source = str(Path(sartor.__file__).parents[1])
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == "[]"


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert sartor_home() == Path(os.environ["SARTOR_HOME"])
    monkeypatch.delenv("SARTOR_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert sartor_home() == tmp_path / "sartor"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert sartor_home().parts[-3:] == ("Library", "Caches", "sartor")
