"""The catalogue: short names of widely used open models and where to get them."""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sartor.errors import FormatError, UsageError
from sartor.store.local import PICKLES
from sartor.store.reference import ModelRef, parse_bare, parse_source, path_ref


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

    A catalogue name wins over a path of the same spelling (write ``./name`` for the path), and a
    path that exists over a repository ``org/name``. Raises UsageError, with near matches where the
    name is unknown.
    """
    text = text.strip()
    catalogue = catalogue or default_catalogue()
    if text.lower() in catalogue:
        return ModelRef("catalogue", text.lower())
    if not text:
        raise UsageError("the model name is empty; `sartor list` shows what is there")
    if text.lower().startswith("file://"):
        from urllib.parse import unquote, urlsplit

        text = unquote(urlsplit(text).path)
    path = Path(os.path.expanduser(text))  # leaves the name of nobody as it is
    there = os.path.lexists(path)  # a broken link too: whoever opens it says what is wrong
    if there and not text.startswith(("hf:", "modelscope:", "pypi:")):
        return path_ref(path)
    source = parse_source(text) or parse_bare(text)
    if source is not None:
        return source
    if os.sep in text or "/" in text or text.startswith((".", "~")) or _is_file_name(path):
        raise UsageError(f"no such file or folder: {text}; check the path")
    raise UsageError(f"unknown model {text!r}; {_suggestion(text.lower(), catalogue)}")


def _is_file_name(path: Path) -> bool:
    return path.suffix.lower() in (".gguf", ".safetensors", *PICKLES)


def _suggestion(name: str, catalogue: Catalogue) -> str:
    near = _near(name, catalogue)
    if near:
        return f"did you mean {', '.join(near)}?"
    return (
        f"the catalogue has {', '.join(sorted(catalogue.entries))}; or name org/name (of Hugging "
        "Face), modelscope:org/name, pypi:package or a path"
    )


def _near(name: str, catalogue: Catalogue) -> list[str]:
    """Names that may have been meant: those of the family, else those that are spelled alike."""
    import difflib

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9.]", "", text)

    names = {plain(known): known for known in catalogue.entries}
    family, _, size = name.partition(":")
    families = {plain(known.partition(":")[0]): known.partition(":")[0] for known in names.values()}
    found = difflib.get_close_matches(plain(family), families, n=1, cutoff=0.75)
    if found:
        members = [known for known in names.values() if known.startswith(families[found[0]] + ":")]
        if not size:
            return members
        sizes = {plain(known.partition(":")[2]): known for known in members}
        near = difflib.get_close_matches(plain(size), sizes, n=3, cutoff=0.5)
        return [sizes[one] for one in near[: 1 if plain(size) in sizes else 3]] or members
    return [names[n] for n in difflib.get_close_matches(plain(name), names, n=3, cutoff=0.5)]
