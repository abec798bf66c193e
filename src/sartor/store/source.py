"""What the sources have in common: their result, their errors, and which files make a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from sartor.errors import SartorError, UsageError
from sartor.store.local import PICKLES, WHOLE, listed, pickle_message
from sartor.store.quantizations import choose, offers, quantization
from sartor.store.redacted import redacted

_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_SIDE_FILES = (".json", ".txt", ".model", ".jinja")
_MODULE = re.compile(r"\d+_\w+/config\.json")
"""What sentence-transformers keeps of a module (pooling, say) beside the weights."""


class SourceError(SartorError):
    """One source could not deliver; another one may. Its message has no secrets of addresses."""

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


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


def choose_files(
    names: Iterable[str],
    prefer: Sequence[str],
    where: str,
    *,
    sizes: Mapping[str, int | None] | None = None,
    quant: str | None = None,
    room: Callable[[], int | None] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """Which of ``names`` make one model: one GGUF model (see ``quantizations.py`` for which), or a
    safetensors folder.

    ``sizes`` in bytes, as far as they are known. Raises SourceError where there are no weights,
    UsageError where the choice is the user's.
    """
    everything = sorted(names)
    ggufs = [name for name in everything if _is_model(name)]
    if ggufs:
        known = {name: (sizes or {}).get(name) for name in ggufs}
        offered = offers(known)
        return [*choose(offered, where, prefer=prefer, quant=quant, room=room, say=say).files]
    if quant is not None:
        raise UsageError(
            f"{where} has no GGUF files of which one could be {quant}; leave that away"
        )
    top = [n for n in everything if "/" not in n]
    weights = [n for n in top if n.endswith(".safetensors") and not n.startswith("adapter")]
    # Some repositories carry the same weights twice, once as `consolidated*`.
    weights = [n for n in weights if n.startswith("model")] or weights
    if not weights or "config.json" not in top:
        raise SourceError(_no_weights(everything, where))
    if WHOLE in weights:  # what is read, whatever shards lie beside it
        weights = [WHOLE]
    modules = [n for n in everything if _MODULE.fullmatch(n)]
    return [*weights, *(n for n in top if n.endswith(_SIDE_FILES)), *modules]


def _is_model(name: str) -> bool:
    """Whether a file is a GGUF file of a language model: not the part that sees images, nor
    statistics of activations, which repositories keep beside it."""
    file = PurePosixPath(name).name.lower()
    if not file.endswith(".gguf") or "mmproj" in file:
        return False
    return "imatrix" not in file or quantization(file) is not None


def _no_weights(names: Sequence[str], where: str) -> str:
    adapter = any(PurePosixPath(name).name == "adapter_config.json" for name in names)
    if adapter:
        return f"{where} is a LoRA adapter, not a model; name the model that it was made for"
    pickles = [name for name in names if PurePosixPath(name).suffix.lower() in PICKLES]
    if pickles:
        return pickle_message(f"{where} has only {listed(pickles)}")
    return f"{where} has no GGUF file and no safetensors checkpoint"


def shards_of(file: str, names: Iterable[str]) -> list[str]:
    """All shards of the split GGUF that ``file`` belongs to; ``file`` alone where it is whole."""
    shard = _SHARD.fullmatch(file)
    if shard is None:
        return [file]
    pattern = rf"{re.escape(shard['stem'])}-\d{{5}}-of-{shard['count']}\.gguf"
    same = re.compile(pattern, re.IGNORECASE)
    return sorted(n for n in names if same.fullmatch(n))


def main_path(files: Sequence[FileRecord]) -> str:
    """What to open: the (first) GGUF file, or ``""`` for the checkpoint folder itself."""
    return next((f.path for f in sorted(files, key=lambda f: f.path) if _is_gguf(f)), "")


def _is_gguf(record: FileRecord) -> bool:
    return record.path.lower().endswith(".gguf")
