"""What a path on this machine holds: the one place that decides which weights are opened.

It looks at names and at the first bytes of files, and parses none of them: the store asks it what
a path is, and ``formats/checkpoint.py`` opens what it answers.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sartor.errors import FormatError, SartorError, UsageError

GGUF_MAGIC = b"GGUF"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WHOLE = "model.safetensors"
"""The file that counts where it is there, whatever an index beside it says (as in transformers)."""

_INDEX = ".safetensors.index.json"
_SPLIT = re.compile(r".+-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_CUT = re.compile(r".+\.gguf[-.](split-[a-z]+|part-?\d+(of\d+)?)", re.IGNORECASE)
"""Pieces of one file, cut by size: they are put together before anything reads them."""

_NO_WEIGHTS = (".json", ".txt", ".md", ".py", ".jinja", ".safetensors")
_SHOWN = 8
_MOST_LOOKED_INTO = 64  # files whose first bytes are read where no name in a folder tells


@dataclass(frozen=True, slots=True)
class LocalWeights:
    """Weights that can be opened.

    ``path`` is the GGUF file, the first one of a split set, or the folder that holds config.json;
    ``files`` are the weights themselves, as far as they are there.
    """

    kind: Literal["gguf", "safetensors"]
    path: Path
    files: tuple[Path, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def find_weights(path: Path) -> LocalWeights:
    """The weights that ``path`` names: a GGUF file (by its suffix or its first bytes), or a folder
    with config.json and safetensors, or with one GGUF model.

    Safetensors count first where a folder has both. A folder of the Hugging Face cache stands for
    its current snapshot. Errors say what the path is instead, and what to give: UsageError,
    FormatError for a split model without its first file, SartorError where nothing can be read.
    """
    if os.path.isdir(path):
        return _in_folder(path)
    if not os.path.exists(path):
        if os.path.islink(path):
            raise UsageError(
                f"{path}: a link to {os.readlink(path)}, which does not exist; fetch the file again"
            )
        raise UsageError(f"{path}: no such file or folder; check the path")
    if not os.path.isfile(path):
        raise UsageError(f"{path}: not a regular file")
    return _file(path)


def split_set(path: Path) -> list[Path]:
    """All files of the set that a name like ``m-00002-of-00003.gguf`` belongs to, in order, there
    or not; empty for any other name."""
    found = _SPLIT.fullmatch(path.name)
    if found is None:
        return []
    start, end = found.span("number")
    before, after = path.name[:start], path.name[end:]
    return [path.with_name(f"{before}{n + 1:05}{after}") for n in range(int(found["count"]))]


def listed(names: Iterable[str]) -> str:
    """Names for an error: the first few, and how many there are besides."""
    everything = list(names)
    more = len(everything) - _SHOWN
    return ", ".join(everything[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _file(path: Path) -> LocalWeights:
    cut = _CUT.fullmatch(path.name)
    if cut is not None:
        whole = path.name[: cut.start(1) - 1]
        raise UsageError(
            f"{path}: a piece of a file that was cut; put the pieces together in order "
            f"(cat {whole}{path.name[cut.start(1) - 1]}* > {whole}) and give {whole}"
        )
    suffix = path.suffix.lower()
    if suffix == ".gguf" or _is_gguf(path):
        return _gguf(path)
    if suffix in PICKLES:
        raise UsageError(pickle_message(str(path)))
    if suffix == ".safetensors" or path.name == "config.json" or path.name.endswith(_INDEX):
        folder = path.parent
        if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
            raise UsageError(_adapter_message(path, folder))
        if (folder / "config.json").exists():
            raise UsageError(f"{path}: part of a checkpoint; give the folder: {folder}")
        raise UsageError(
            f"{path}: give the folder, which also holds config.json; {folder} has none: "
            "fetch the whole checkpoint"
        )
    raise UsageError(
        f"{path}: no .gguf file; give one, or a folder with config.json and *.safetensors"
    )


def _gguf(path: Path) -> LocalWeights:
    files = split_set(path)
    if not files:
        return LocalWeights("gguf", path, (path,))
    first = files[0]
    if not first.exists():
        raise FormatError(f"{first}: this first file of the split model is missing; fetch it")
    if path != first:
        number = files.index(path) + 1 if path in files else path.name
        raise UsageError(
            f"{path}: file {number} of {len(files)} of a split model; give file 1: {first}"
        )
    return LocalWeights("gguf", path, tuple(file for file in files if file.exists()))


def _in_folder(folder: Path) -> LocalWeights:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise SartorError(f"{folder}: cannot be read: {error.strerror or error}") from error
    names = {entry.name for entry in entries}
    has_index = any(name.endswith(_INDEX) for name in names)
    tensors = [
        entry
        for entry in entries
        if entry.suffix == ".safetensors" and not entry.name.startswith("adapter_")
    ]
    if "config.json" in names and (tensors or has_index):
        whole = folder / WHOLE
        files = [whole] if whole.exists() else [file for file in tensors if file.exists()]
        return LocalWeights("safetensors", folder, tuple(files))
    models = _gguf_models(entries)
    if len(models) == 1:
        return _gguf(models[0])
    if models:
        raise UsageError(
            f"{folder}: holds {len(models)} GGUF files; "
            f"name one of {listed(model.name for model in models)}"
        )
    snapshot = _snapshot(folder)
    if snapshot is not None:
        return _in_folder(snapshot)
    raise UsageError(_what_else(folder, entries, bool(tensors or has_index)))


def _gguf_models(entries: Sequence[Path]) -> list[Path]:
    """The models among some files: of a split set, what should be its first file."""
    ggufs = [entry for entry in entries if entry.suffix.lower() == ".gguf"]
    if not ggufs:
        unnamed = [e for e in entries if e.suffix.lower() not in _NO_WEIGHTS and e.is_file()]
        with contextlib.suppress(SartorError):
            ggufs = [entry for entry in unnamed[:_MOST_LOOKED_INTO] if _is_gguf(entry)]
    models = {(split_set(file) or [file])[0]: None for file in ggufs}
    # What belongs to a model and is none: the part that sees images, statistics of activations.
    aside = [m for m in models if "mmproj" in m.name.lower() or m.name.lower().startswith("imatr")]
    return [m for m in models if m not in aside] or aside


def _snapshot(folder: Path) -> Path | None:
    """The current snapshot of a ``models--org--name`` folder of the Hugging Face cache."""
    snapshots = folder if folder.name == "snapshots" else folder / "snapshots"
    try:
        found = sorted(entry for entry in snapshots.iterdir() if entry.is_dir())
    except OSError:
        return None
    main = snapshots.with_name("refs") / "main"
    if main.is_file():
        current = main.read_text(encoding="utf-8", errors="replace").strip()
        for entry in found:
            if entry.name == current:
                return entry
    if len(found) > 1:
        raise UsageError(
            f"{folder}: has {len(found)} snapshots; "
            f"name one of {listed(str(entry) for entry in found)}"
        )
    return found[0] if found else None


def _what_else(folder: Path, entries: Sequence[Path], has_safetensors: bool) -> str:
    """Why a folder is no checkpoint."""
    names = {entry.name for entry in entries}
    if "adapter_config.json" in names:
        return _adapter_message(folder, folder)
    if has_safetensors:
        return f"{folder}: has safetensors but no config.json; fetch the whole folder"
    pickles = [entry for entry in entries if entry.suffix.lower() in PICKLES]
    if pickles:
        return pickle_message(str(pickles[0]))
    below = [entry for entry in entries if os.path.isdir(entry) and _looks_like_one(entry)]
    if below:
        return f"{folder}: holds no checkpoint itself; name one of {listed(map(str, below))}"
    return f"{folder}: holds no checkpoint (config.json with safetensors, or a .gguf)"


def _looks_like_one(folder: Path) -> bool:
    try:
        return any(e.suffix.lower() in (".gguf", ".safetensors") for e in folder.iterdir())
    except OSError:
        return False


def pickle_message(where: str) -> str:
    """Why pickled weights are not read, and the way out."""
    return (
        f"{where}: a Python pickle, which can run any code when it is read, so it is not; "
        "use the safetensors or GGUF version of the model, or convert it where you trust it "
        "(save_pretrained of transformers writes safetensors)"
    )


def _adapter_message(path: Path, folder: Path) -> str:
    return (
        f"{path}: a LoRA adapter, not a model; give the model that it was made for, "
        f"and --adapter NAME={folder} to `sartor serve`"
    )


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError as error:
        raise SartorError(f"{path}: cannot be read: {error.strerror or error}") from error
