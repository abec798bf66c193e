"""A stored model and the ``manifest.json`` that makes it one."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sartor.store.source import Fetched, FileRecord, main_path

MANIFEST = "manifest.json"
FILES = "files"  # the sub-folder of the weights: no file of a source can pose as the manifest
_VERSION = 1


@dataclass(frozen=True, slots=True)
class StoredModel:
    """Weights that can be opened now.

    ``path`` is the .gguf file or the checkpoint folder; ``digest`` is ``sha256:HEX`` of the one
    file, or of the lines ``HEX  PATH`` of all; ``verified`` says that every file was compared with
    a digest that its source stated. A local path has no digest and no ``pulled_at``.
    """

    name: str
    path: Path
    source: str
    size_bytes: int
    digest: str | None
    verified: bool
    license: str | None
    pulled_at: datetime | None


def write_manifest(folder: Path, name: str, fetched: Fetched, license_: str | None) -> None:
    """Write the manifest of the model in ``folder`` and force it to disk."""
    content = {
        "version": _VERSION,
        "name": name,
        "source": fetched.origin,
        "license": license_,
        "digest": _digest(fetched.files),
        "verified": all(f.verified for f in fetched.files),
        "main": main_path(fetched.files),
        "pulled_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": [
            {"path": f.path, "size": f.size, "sha256": f.sha256, "verified": f.verified}
            for f in fetched.files
        ],
    }
    _write(folder / MANIFEST, content)


def rename_manifest(folder: Path, name: str) -> None:
    """Give the model in ``folder`` another name."""
    content = json.loads((folder / MANIFEST).read_bytes())
    part = folder / f"{MANIFEST}.part"
    _write(part, {**content, "name": name})
    os.replace(part, folder / MANIFEST)


def _write(path: Path, content: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as out:
        json.dump(content, out, indent=1)
        out.flush()
        os.fsync(out.fileno())


def read_manifest(folder: Path) -> StoredModel | None:
    """The model in ``folder``; None where it is missing, damaged or of another version.

    Sizes are compared, contents are not: this must be quick.
    """
    try:
        content: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        if content["version"] != _VERSION:
            return None
        size = 0
        for file in content["files"]:
            if (folder / FILES / file["path"]).stat().st_size != file["size"]:
                return None
            size += file["size"]
        return StoredModel(
            name=content["name"],
            path=folder / FILES / content["main"],
            source=content["source"],
            size_bytes=size,
            digest=content["digest"],
            verified=content["verified"],
            license=content["license"],
            pulled_at=datetime.fromisoformat(content["pulled_at"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_damaged(folder: Path) -> bool:
    """Whether this is no model any more: files are missing or cut. One that a later version of
    Sartor wrote is not damaged."""
    try:
        version = json.loads((folder / MANIFEST).read_bytes())["version"]
    except FileNotFoundError:
        return True
    except OSError:
        return False
    except (ValueError, KeyError, TypeError):
        return True
    return version == _VERSION and read_manifest(folder) is None


def _digest(files: tuple[FileRecord, ...]) -> str:
    if len(files) == 1:
        return f"sha256:{files[0].sha256}"
    lines = "".join(f"{f.sha256}  {f.path}\n" for f in sorted(files, key=lambda f: f.path))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
