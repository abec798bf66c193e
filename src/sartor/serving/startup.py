"""The start of a server: what it is checked for before anything is loaded, and what there is to
tell once it is ready."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from sartor.engine.preset import Preset
from sartor.errors import UsageError
from sartor.serving.frontend import ServedModel
from sartor.serving.messages import AdapterSpec, HostedModel
from sartor.serving.names import lookup
from sartor.store.store import ModelStore

KEY_PLACEHOLDER = "YOUR_KEY"
_LONGEST_NAME = 256


@dataclass(frozen=True)
class Started:
    """A server that is ready.

    urls      addresses that clients can use, the one for this machine first
    models    in the order in which they were named; the first is the one to try
    hosted    what the worker says of each, by name
    keys      how many API keys there are; None: nobody needs one
    memory_bytes  what the worker may take; None: no limit
    """

    urls: tuple[str, ...]
    models: tuple[ServedModel, ...]
    hosted: Mapping[str, HostedModel]
    keys: int | None = None
    memory_bytes: int | None = None

    @property
    def ready_line(self) -> str:
        names = ", ".join(model.name for model in self.models)
        return f"Ready: {names} at {self.urls[0]}/v1 (Ctrl-C stops)"

    def example(self) -> str:
        """A line for a shell that asks the first model something, or has a vector made."""
        model = self.models[0]
        body: dict[str, object] = {"model": (*model.listed, model.name)[0]}
        if model.makes == "embeddings":
            path = "embeddings"
            body["input"] = "Hello"
        elif model.template is not None:
            path = "chat/completions"
            body["messages"] = [{"role": "user", "content": "Hello"}]
        else:
            path = "completions"
            body["prompt"] = "Once upon a time"
        words = ["curl", f"{self.urls[0]}/v1/{path}", "-H", "Content-Type: application/json"]
        if self.keys is not None:
            words += ["-H", f"Authorization: Bearer {KEY_PLACEHOLDER}"]
        return shlex.join([*words, "-d", json.dumps(body, ensure_ascii=False)])


def check_adapters(adapters: Mapping[str, Path], folder: Path | None) -> None:
    """Raises UsageError where there is no such folder."""
    for name, path in adapters.items():
        if not name.isprintable():
            raise UsageError(
                f"serve: the adapter {name[:40]!r} has a name with characters that cannot be shown"
            )
        if not path.is_dir():
            raise UsageError(f"serve: the adapter {name}: {path} is no folder")
    if folder is not None and not folder.is_dir():
        raise UsageError(f"serve: the adapter folder {folder} does not exist")


def check_origins(origins: Sequence[str]) -> None:
    """Raises UsageError for what no browser would send as the origin of a page."""
    for origin in origins:
        parts = urlsplit(origin)
        # An origin has no path (RFC 6454), not even a slash.
        if origin != "*" and (not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}"):
            raise UsageError(
                f"serve: {origin!r} is no origin of a web page; write it like https://example.org "
                "or http://localhost:3000, or * for every page"
            )


def add_adapters(served: Mapping[str, ServedModel], adapters: Mapping[str, Path]) -> None:
    """Gives the (only) model its adapters. Raises UsageError."""
    if adapters and len(served) > 1:
        raise UsageError("serve: adapters are for one model; serve it alone")
    (model, *_) = served.values()
    for name, path in adapters.items():
        if lookup(served, name) is not None:
            raise UsageError(f"serve: the adapter {name} has the name of the model; rename it")
        model.adapters[name] = AdapterSpec(name, str(path.resolve()))


def add_presets(
    served: Mapping[str, ServedModel], presets: Sequence[Preset], store: ModelStore
) -> None:
    """Gives models their presets. Raises UsageError where a name is taken, or no model is the
    preset's."""
    for preset in presets:
        where = f"serve: the preset {preset.name}"
        if (taken := lookup(served, preset.name)) is not None:
            raise UsageError(f"{where} has the name of {taken.kind} here; rename it")
        if preset.model:
            stored = store.resolve(preset.model)
            meant = None if stored is None else lookup(served, stored.name)
            if meant is None:
                raise UsageError(f"{where} is for {preset.model}; name that model too")
            model = meant.model
        elif len(served) == 1:
            (model,) = served.values()
        else:
            raise UsageError(
                f"{where} names no model, and {len(served)} are served; write model = ... into it"
            )
        if model.makes != "text":
            raise UsageError(f"{where} is for models that write text; {model.name} makes vectors")
        if preset.chats and model.template is None:
            raise UsageError(
                f"{where} has a system prompt or template variables, but {model.name} has no chat "
                "template"
            )
        model.presets[preset.name] = preset


def add_aliases(served: Mapping[str, ServedModel], aliases: Mapping[str, str]) -> None:
    """Gives models further names. Raises UsageError where a name is taken, or the model is none
    of those that are served."""
    for name, target in aliases.items():
        if not name.isprintable() or len(name) > _LONGEST_NAME:
            raise UsageError(
                f"serve: the alias {name[:40]!r} is no name: it must be printable, and have at "
                f"most {_LONGEST_NAME} characters"
            )
        found = lookup(served, target)
        if found is None or found.adapter or found.preset:
            what = f"is {found.kind}" if found else "is not served"
            raise UsageError(
                f"serve: the alias {name} is for {target}, which {what}; name one of "
                f"{', '.join(served)}"
            )
        other = lookup(served, name)
        if other is not None:
            raise UsageError(
                f"serve: the alias {name} is a name of {other.stands_for} already; choose another"
            )
        model = found.model
        model.aliases |= {name}
        model.listed = (*model.listed, name)
