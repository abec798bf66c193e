"""What the sources have in common: their result, their errors, and which files make a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from sartor.errors import SartorError, UsageError

# The order in which weight types are taken from a repository that offers several.
PREFERENCE = (
    *("Q4_K_M", "Q8_0", "Q4_0", "Q4_1", "Q5_K_M", "Q6_K", "Q4_K_S", "Q5_K_S", "IQ4_NL"),
    *("Q5_0", "Q5_1", "IQ4_XS", "Q3_K_M", "BF16", "F16", "FP16", "F32"),
)

_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
_SIDE_FILES = (".json", ".txt", ".model", ".jinja")
_MODULE = re.compile(r"\d+_\w+/config\.json")
"""What sentence-transformers keeps of a module (pooling, say) beside the weights."""


class SourceError(SartorError):
    """One source could not deliver; another one may."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a model: path relative to the model's folder, size in bytes, digest in hex.

    ``verified``: the file was compared with a digest that the source stated.
    """

    path: str
    size: int
    sha256: str
    verified: bool


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a source left in the staging folder. ``origin`` names it with its exact revision."""

    origin: str
    files: tuple[FileRecord, ...]
    license: str | None


def choose_files(names: Iterable[str], prefer: Sequence[str], where: str) -> list[str]:
    """Which of ``names`` make one model: the GGUF of the preferred type, or a safetensors folder.

    Raises SourceError where there are no weights, UsageError where the choice is the user's.
    """
    everything = sorted(names)
    ggufs = [n for n in everything if n.endswith(".gguf") and "mmproj" not in n.lower()]
    if ggufs:
        return _choose_gguf(ggufs, (*prefer, *PREFERENCE), where)
    top = [n for n in everything if "/" not in n]
    weights = [n for n in top if n.endswith(".safetensors") and not n.startswith("adapter")]
    # Some repositories carry the same weights twice, once as `consolidated*`.
    weights = [n for n in weights if n.startswith("model")] or weights
    if not weights or "config.json" not in top:
        raise SourceError(f"{where} has no GGUF file and no safetensors checkpoint")
    modules = [n for n in everything if _MODULE.fullmatch(n)]
    return [*weights, *(n for n in top if n.endswith(_SIDE_FILES)), *modules]


def _choose_gguf(names: list[str], prefer: Sequence[str], where: str) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name in names:
        shard = _SHARD.fullmatch(name)
        groups.setdefault(shard["stem"] if shard else name, []).append(name)
    if len(groups) == 1:
        return names
    for kind in prefer:
        pattern = re.compile(rf"(?<![A-Z0-9]){re.escape(kind)}(?![A-Z0-9_])")
        for stem, members in groups.items():
            if pattern.search(PurePosixPath(stem).name.upper()):
                return members
    raise UsageError(f"{where} has several GGUF files; name one of them: {', '.join(groups)}")


def shards_of(file: str, names: Iterable[str]) -> list[str]:
    """All shards of the split GGUF that ``file`` belongs to; ``file`` alone where it is whole."""
    shard = _SHARD.fullmatch(file)
    if shard is None:
        return [file]
    same = re.compile(rf"{re.escape(shard['stem'])}-\d{{5}}-of-{shard['count']}\.gguf")
    return sorted(n for n in names if same.fullmatch(n))


def main_path(files: Sequence[FileRecord]) -> str:
    """What to open: the (first) GGUF file, or ``""`` for the checkpoint folder itself."""
    return next((f.path for f in sorted(files, key=lambda f: f.path) if _is_gguf(f)), "")


def _is_gguf(record: FileRecord) -> bool:
    return record.path.endswith(".gguf")
