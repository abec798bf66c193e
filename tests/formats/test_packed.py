"""Packed files: what is written is read, damage is found, and nothing half-written stays."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sartor.errors import FormatError, SartorError, UsageError
from sartor.formats.packed import (
    ALIGNMENT,
    DATA_START,
    PackedFile,
    PackedWriter,
    collect_garbage,
    write_packed,
)

FUZZ = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
META = {"recipe": "q4", "layers": [1, 2], "nested": {"threads": 2.5}}
ARRAYS = {
    "codes": np.arange(1000, dtype=np.uint8).reshape(10, 100),
    "scale": np.linspace(-1, 1, 7, dtype=np.float32),
    "half": np.ones((2, 3, 4), np.float16),
    "empty": np.zeros((0, 5), np.int64),
    "scalar": np.array(3, np.int32),
}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return write_packed(tmp_path / "m.packed", META, ARRAYS)


def test_round_trip(packed: Path) -> None:
    file = PackedFile.open(packed)
    assert file.meta == META
    assert file.names() == list(ARRAYS)
    assert file.nbytes == packed.stat().st_size
    for name, values in ARRAYS.items():
        array = file.array(name)
        np.testing.assert_array_equal(array, values)
        assert array.dtype == values.dtype
        assert array.shape == values.shape
        assert not array.flags.writeable
        assert not array.flags.owndata
        assert array.ctypes.data % ALIGNMENT == 0 or not array.size


def test_strided_and_big_endian_arrays_are_stored_plainly(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.int32).reshape(3, 4)
    given = {"t": values.T, "s": values[:, ::2], "b": values.astype(">i4")}
    file = PackedFile.open(write_packed(tmp_path / "m.packed", {}, given))
    for name, array in given.items():
        np.testing.assert_array_equal(file.array(name), array)


def test_same_content_same_digest(packed: Path) -> None:
    again = write_packed(packed.with_name("n.packed"), META, ARRAYS)
    assert PackedFile.open(again).digest == PackedFile.open(packed).digest
    assert again.read_bytes() == packed.read_bytes()


def test_an_unfinished_file_never_appears(tmp_path: Path) -> None:
    path = tmp_path / "m.packed"
    with PackedWriter(path, {}) as writer:
        writer.add("a", np.zeros(4, np.uint8))
        assert not path.exists()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), PackedWriter(path, {}):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SartorError, match="finished or abandoned"):
        writer.finish()


def test_an_old_file_survives_a_failed_rewrite(packed: Path) -> None:
    writer = PackedWriter(packed, {})
    writer.add("a", np.zeros(4, np.uint8))
    with pytest.raises(UsageError, match="twice"):
        writer.add("a", np.zeros(4, np.uint8))
    assert PackedFile.open(packed).meta == META
    assert [file.name for file in packed.parent.iterdir()] == [packed.name]


def test_a_mapped_file_survives_its_replacement(packed: Path) -> None:
    before = PackedFile.open(packed)
    write_packed(packed, {}, {"other": np.zeros(1, np.uint8)})
    np.testing.assert_array_equal(before.array("codes"), ARRAYS["codes"])


def test_odd_dtypes_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'z'.*complex128"):
        write_packed(tmp_path / "m.packed", {}, {"z": np.zeros(1, np.complex128)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", ["add", "finish"])
def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    writer = PackedWriter(tmp_path / "m.packed", {})

    class FullDisk:
        def __init__(self, file: object) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            self.file.close()

    if failing == "finish":
        writer.add("a", np.zeros(100, np.uint8))
    writer._file = FullDisk(writer._file)
    with pytest.raises(SartorError, match=r"m\.packed.*disk is full"):
        writer.add("b", np.zeros(100, np.uint8)) if failing == "add" else writer.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SartorError, match="cannot be written"):
        PackedWriter(tmp_path / "file" / "m.packed", {})


def test_a_missing_array_is_named(packed: Path) -> None:
    with pytest.raises(FormatError, match="'nope'"):
        PackedFile.open(packed).array("nope")


def test_another_version_is_named(packed: Path) -> None:
    content = bytearray(packed.read_bytes())
    content[8] = 9
    packed.write_bytes(content)
    with pytest.raises(FormatError, match="version 9"):
        PackedFile.open(packed)


def forge(path: Path, header: object, data: int = 64) -> None:
    """A packed file with a header of our choosing and a correct digest."""
    raw = header if isinstance(header, bytes) else msgspec.json.encode(header)
    at = DATA_START + data
    digest = hashlib.sha256(raw).digest()
    preamble = struct.pack("<8sIIQQ32s", b"SARTORPK", 1, 0, at, len(raw), digest)
    path.write_bytes(preamble + bytes(at - len(preamble)) + raw)


def one(**changes: object) -> dict[str, object]:
    entry = {"dtype": "uint8", "shape": [64], "offset": DATA_START, "nbytes": 64} | changes
    return {"meta": {}, "arrays": {"a": entry}}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        one(dtype="object"),
        one(dtype="complex64"),
        one(shape=[65]),
        one(shape=[-64]),
        one(shape=[1] * 40),
        one(shape=[0, 1 << 50, 1 << 50], nbytes=0),
        one(offset=DATA_START + 64),
        one(offset=DATA_START + 1),
        one(offset=0),
        one(offset=-64),
        one(nbytes=-1),
        one(nbytes=1 << 62),
        one(more=1),
        {"meta": {}, "arrays": {"a": one()["arrays"]["a"], "b": one()["arrays"]["a"]}},
    ],
)
def test_forged_headers_are_refused(tmp_path: Path, header: object) -> None:
    path = tmp_path / "forged.packed"
    forge(path, header)
    with pytest.raises(FormatError, match=r"forged\.packed"):
        PackedFile.open(path)


def test_the_forge_itself_is_sound(tmp_path: Path) -> None:
    forge(tmp_path / "f.packed", one())
    assert PackedFile.open(tmp_path / "f.packed").array("a").shape == (64,)


@FUZZ
@given(data=st.data())
def test_truncated_and_flipped_headers_are_found(packed: Path, data: st.DataObject) -> None:
    content = bytearray(packed.read_bytes())
    at = struct.unpack_from("<Q", content, 16)[0]
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        # Bytes 12 to 16 are reserved; the rest of the preamble and the header count.
        places = st.integers(0, 11) | st.integers(16, 63) | st.integers(at, len(content) - 1)
        content[data.draw(places)] ^= 1 << data.draw(st.integers(0, 7))
    bad = packed.with_name("bad.packed")
    bad.write_bytes(content)
    with pytest.raises(FormatError, match=r"bad\.packed"):
        PackedFile.open(bad)


def test_collection_removes_the_least_recently_used(tmp_path: Path) -> None:
    now = time.time()
    for age, name in enumerate("dcba"):
        path = write_packed(tmp_path / f"{name}.packed", {}, {"w": np.zeros(4096, np.uint8)})
        os.utime(path, (now - 1000 + age, now - 1000 + age))
    size = path.stat().st_size
    PackedFile.open(tmp_path / "d.packed")  # the oldest is used again
    keep = [tmp_path / "c.packed"]
    (tmp_path / "other.txt").write_bytes(bytes(100_000))
    assert collect_garbage(tmp_path, 4 * size, keep) == []
    assert [path.name for path in collect_garbage(tmp_path, 2 * size, keep)] == [
        "b.packed",
        "a.packed",
    ]
    assert [path.name for path in collect_garbage(tmp_path, 0, keep)] == ["d.packed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.packed", "other.txt"]


def test_collection_removes_what_a_crash_left(tmp_path: Path) -> None:
    crashed = PackedWriter(tmp_path / "old.packed", {})
    running = PackedWriter(tmp_path / "new.packed", {})
    left = next(tmp_path.glob(".old*"))
    os.utime(left, (0, 0))
    assert collect_garbage(tmp_path, 1 << 40) == [left]
    assert PackedFile.open(running.finish()).names() == []
    crashed.abort()


def test_collecting_an_absent_folder_is_nothing(tmp_path: Path) -> None:
    assert collect_garbage(tmp_path / "none", 0) == []
