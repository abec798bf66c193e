"""Packed files: what a backend made of a checkpoint, ready to be used in place.

Layout, little-endian::

    0      preamble, 64 bytes: magic, version, offset and length and SHA-256 of the header
    4096   arrays, each aligned to 64 bytes (a cache line; the section itself to a page)
    ...    header: JSON {"meta": {...}, "arrays": {name: {dtype, shape, offset, nbytes}}}

The header stands last, so that a writer needs no more memory than one array. A file appears
under its name only when it is whole: it is written beside it, flushed and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import struct
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import msgspec
import numpy as np
import numpy.typing as npt

from sartor.errors import FormatError, SartorError, UsageError
from sartor.formats.files import MappedFile, is_shape

MAGIC = b"SARTORPK"
VERSION = 1
SUFFIX = ".packed"
ALIGNMENT = 64
DATA_START = 4096

_PREAMBLE = struct.Struct("<8sIIQQ32s")
_TEMPORARY = ".part"
_ABANDONED_SECONDS = 3600.0
_DTYPES = {
    np.dtype(code).name: np.dtype(code).newbyteorder("<")
    for code in "?bBhHiIqQefd"  # numpy's characters, bool to float64
}

AnyArray = npt.NDArray[np.generic]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    meta: dict[str, object]
    arrays: dict[str, _Entry]


class PackedWriter:
    """Writes a packed file array by array; use as a context manager.

    The file appears at :meth:`finish`; leaving the block without it, or an error, removes
    every trace. ``meta`` must be JSON data. Errors: :class:`SartorError` naming the path, also
    when the disk is full.
    """

    def __init__(self, path: Path, meta: Mapping[str, object]) -> None:
        self.path = path
        self._meta = dict(meta)
        self._entries: dict[str, _Entry] = {}
        self._temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}{_TEMPORARY}")
        self._at = DATA_START
        self._file: BinaryIO | None = None
        with self._cleanup():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("xb")
            _only_own(self._temporary)
            self._file.write(bytes(DATA_START))

    @contextlib.contextmanager
    def _cleanup(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.abort()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise SartorError(
                    f"{self.path}: the disk is full after {self._at} bytes; free some space, or "
                    "choose another folder for packed models"
                ) from error
            raise SartorError(
                f"{self.path}: cannot be written: {error.strerror or error}"
            ) from error
        except BaseException:
            self.abort()
            raise

    def _open_file(self) -> BinaryIO:
        if self._file is None:
            raise SartorError(f"{self.path}: the packed file is already finished or abandoned")
        return self._file

    def add(self, name: str, array: AnyArray) -> None:
        """Appends ``array`` (any shape; stored C-contiguous, little-endian)."""
        file = self._open_file()
        with self._cleanup():
            if name in self._entries:
                raise UsageError(f"{self.path}: array {name!r} is given twice")
            if array.dtype.name not in _DTYPES:
                raise UsageError(f"{self.path}: array {name!r}: dtype {array.dtype} has no place")
            padding = -self._at % ALIGNMENT
            file.write(bytes(padding))
            offset = self._at + padding
            little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            file.write(little.reshape(-1).view(np.uint8).data)
            self._entries[name] = _Entry(array.dtype.name, array.shape, offset, array.nbytes)
            self._at = offset + array.nbytes

    def finish(self) -> Path:
        """Writes the header, makes the file durable and gives it its name."""
        file = self._open_file()
        with self._cleanup():
            header = msgspec.json.encode(_Header(self._meta, self._entries))
            file.write(header)
            file.seek(0)
            digest = hashlib.sha256(header).digest()
            file.write(_PREAMBLE.pack(MAGIC, VERSION, 0, self._at, len(header), digest))
            file.flush()
            os.fsync(file.fileno())
            file.close()
            self._temporary.replace(self.path)
            _sync_folder(self.path.parent)
        self._file = None
        return self.path

    def abort(self) -> None:
        """Gives up; nothing stays on disk. Harmless after :meth:`finish`."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()
        self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()


def write_packed(path: Path, meta: Mapping[str, object], arrays: Mapping[str, AnyArray]) -> Path:
    """Writes a whole packed file at once; see :class:`PackedWriter`."""
    with PackedWriter(path, meta) as writer:
        for name, array in arrays.items():
            writer.add(name, array)
        return writer.finish()


def _only_own(path: Path) -> None:
    """Takes from others the right to write, for which :func:`_check_owner` looks."""
    with contextlib.suppress(OSError):
        path.chmod(path.stat().st_mode & 0o755)


def _check_owner(path: Path) -> None:
    """Refuses what another user could have made: kernels read it as it is.

    FormatError. Windows has no such owners and modes, so nothing is looked at there.
    """
    if sys.platform == "win32":
        return
    try:
        status = path.stat()
    except OSError:
        return  # it is opened next, which says what is wrong
    if status.st_uid not in (0, os.geteuid()):
        raise FormatError(
            f"{path}: it belongs to another user (uid {status.st_uid}); remove the file to pack it "
            "again"
        )
    if status.st_mode & 0o022:
        raise FormatError(
            f"{path}: other users may write to it (mode {status.st_mode & 0o777:04o}); remove the "
            "file to pack it again"
        )


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable where the system can; the file itself is whole either way."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@dataclass(frozen=True)
class PackedFile:
    """A packed file, mapped read-only; processes that open the same file share its pages."""

    path: Path
    meta: Mapping[str, object]
    digest: str
    """SHA-256 of the header: the identity of the file."""
    _file: MappedFile
    _entries: Mapping[str, _Entry]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Reads and checks the header; touches the file, which is what keeps it from collection.

        Errors: :class:`FormatError` when truncated, damaged or of another version (pack it
        again) or when other users could have written it, :class:`UsageError` when absent. The data
        itself is not hashed.
        """
        _check_owner(path)
        file = MappedFile.open(path)
        header, digest = _read_header(file)
        # Not every file system keeps access times; the modification time marks the last use.
        with contextlib.suppress(OSError):
            os.utime(path)
        return cls(path, header.meta, digest, file, header.arrays)

    def names(self) -> list[str]:
        """Array names in file order."""
        return list(self._entries)

    @property
    def nbytes(self) -> int:
        """The size of the file in bytes."""
        return self._file.size

    def array(self, name: str) -> AnyArray:
        """A read-only view of the file. Valid as long as it is referred to."""
        entry = self._entries.get(name)
        if entry is None:
            raise FormatError(f"{self.path}: no array {name!r}; remove the file to pack it again")
        raw = self._file.view(entry.offset, entry.nbytes)
        return raw.view(_DTYPES[entry.dtype]).reshape(entry.shape)


@dataclass(frozen=True)
class PackedFacts:
    """What a packed file tells of itself.

    ``identity`` is that of the checkpoint that it was made from and ``source`` where that lay;
    None in files of versions before 0.2, which do not say it. ``layout`` is the backend's.
    """

    path: Path
    nbytes: int
    layout: object
    identity: str | None
    source: Path | None


def packed_facts(path: Path) -> PackedFacts:
    """Reads the header alone, and does not count as a use of the file. Errors: as
    :meth:`PackedFile.open`."""
    file = MappedFile.open(path)
    meta = _read_header(file)[0].meta
    origin = meta.get("source")
    known = origin if isinstance(origin, dict) else {}
    identity, source = known.get("identity"), known.get("path")
    return PackedFacts(
        path,
        file.size,
        meta.get("layout"),
        # What a backend's source adds to the checkpoint's identity stands behind it.
        identity.split(" ", 1)[0] if isinstance(identity, str) else None,
        Path(source) if isinstance(source, str) else None,
    )


def abandoned_parts(folder: Path) -> list[Path]:
    """What crashed writers left behind: unfinished files that are an hour old."""
    now, found = time.time(), []
    for path in sorted(folder.glob(f".*{SUFFIX}.*{_TEMPORARY}")):
        with contextlib.suppress(FileNotFoundError):
            if now - path.stat().st_mtime > _ABANDONED_SECONDS:
                found.append(path)
    return found


def _read_header(file: MappedFile) -> tuple[_Header, str]:
    def damaged(reason: str) -> FormatError:
        return FormatError(f"{file.path}: {reason}; remove the file to pack it again")

    if file.size < DATA_START:
        raise damaged(f"{file.size} bytes are no packed file")
    magic, version, _, offset, length, digest = _PREAMBLE.unpack_from(file.data)
    if magic != MAGIC:
        raise damaged(f"starts with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise damaged(f"packed format version {version}, this Sartor reads {VERSION}")
    if offset < DATA_START or offset + length != file.size:
        raise damaged(f"its header ends at byte {offset + length}, the file at {file.size}")
    raw = file.data[offset : offset + length]
    if hashlib.sha256(raw).digest() != digest:
        raise damaged("its header does not match its digest")
    try:
        header = msgspec.json.decode(raw, type=_Header)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise damaged(f"its header cannot be read: {error}") from error
    for name, entry in header.arrays.items():
        reason = _entry_fault(entry, offset)
        if reason:
            raise damaged(f"array {name!r}: {reason}")
    ordered = sorted(header.arrays.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    for (_, before), (name, after) in pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            raise damaged(f"array {name!r} overlaps another")
    return header, digest.hex()


def _entry_fault(entry: _Entry, end: int) -> str | None:
    """What is wrong with an entry; the data section ends at byte ``end``."""
    if entry.dtype not in _DTYPES:
        return f"unknown dtype {entry.dtype!r}"
    if entry.offset % ALIGNMENT or entry.offset < DATA_START or entry.nbytes < 0:
        return f"misplaced at byte {entry.offset}"
    if entry.offset + entry.nbytes > max(end, DATA_START):
        return f"ends at byte {entry.offset + entry.nbytes}, the data at {end}"
    if not is_shape(entry.shape):
        return f"impossible shape of {len(entry.shape)} dimensions"
    nbytes = _DTYPES[entry.dtype].itemsize * math.prod(entry.shape)
    return None if nbytes == entry.nbytes else f"shape {entry.shape} takes {nbytes} bytes"


def collect_garbage(folder: Path, quota_bytes: int, keep: Collection[Path] = ()) -> list[Path]:
    """Removes packed files, the least recently used first, until the rest fit the quota.

    ``keep`` names files that stay whatever the quota. What a crashed writer left behind goes
    too, once it is an hour old. A file in use by a process stays readable there. Returns what
    was removed.
    """
    removed: list[Path] = []

    def remove(path: Path) -> bool:
        # Another process may have removed it, or (Windows) be using it.
        try:
            path.unlink()
        except OSError:
            return False
        removed.append(path)
        return True

    for path in abandoned_parts(folder):
        remove(path)
    found = []
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
    kept = {path.resolve() for path in keep}
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= quota_bytes:
            break
        if path.resolve() not in kept and remove(path):
            total -= size
    return removed
