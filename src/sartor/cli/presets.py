"""Presets of ``sartor.toml``: a system prompt and sampling under a name.

```toml
[presets.poet]
model = "smollm2:135m"         # lets the name stand for the model
system = "Answer in rhymes."
temperature = 1.1
template = { enable_thinking = false }
```
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.cli.settings import FILE, PRESETS, Settings, near, settings_of
from sartor.errors import UsageError

if TYPE_CHECKING:
    import typer

    from sartor.engine.preset import Preset
    from sartor.graph import SamplingDefaults

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
_TEXTS = ("model", "system")
_TAKEN = frozenset(
    {
        *("messages", "tools", "bos_token", "eos_token", "self", "params", "stream"),
        "special_in_text",
    }
)


def preset_names(settings: Settings) -> list[str]:
    """The names of the file's presets."""
    table = settings.tables.get(PRESETS)
    return list(table) if isinstance(table, dict) else []


def preset(settings: Settings, name: str) -> Preset:
    """The preset of that name. UsageError where there is none, or where it is wrong."""
    from sartor.engine.preset import Preset

    names = preset_names(settings)
    if name not in names:
        known = f"there are {', '.join(names)}" if names else f"{settings.path} has none"
        raise UsageError(f"there is no preset {name!r}; {known}")
    where = f"{settings.path}: [{PRESETS}.{name}]"
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{where}: a preset's name has letters, digits and . _ : - and begins with one of the "
            "first two"
        )
    table = settings.tables[PRESETS][name]
    if not isinstance(table, dict):
        raise UsageError(f"{where} is no table; write it as [{PRESETS}.{name}]")
    given = {key.replace("-", "_"): value for key, value in table.items()}
    model, system, template = (given.pop(key, None) for key in (*_TEXTS, "template"))
    for key, text in zip(_TEXTS, (model, system), strict=True):
        if text is not None and not isinstance(text, str):
            raise UsageError(f"{where} {key} is {text!r}; it must be a string")
    if model == "":
        raise UsageError(f"{where} model is empty; leave it out, or name a model")
    if not isinstance(template or {}, dict):
        raise UsageError(f"{where} template is {template!r}; it must be a table of variables")
    if taken := sorted(_TAKEN & (template or {}).keys()):
        raise UsageError(f"{where} template: {', '.join(taken)} cannot be set here")
    return Preset(
        name=name,
        model=_located(model or "", settings.path),
        system=system,
        sampling=_sampling(given, where, name),
        template=template or {},
    )


def chosen(settings: Settings, model: str, named: str | None) -> tuple[str, Preset | None]:
    """What a MODEL and ``--preset`` stand for: the model, and the preset where there is one.

    The name of a preset stands for its model too, before any file or model of that name.
    """
    if named is None and model in preset_names(settings):
        found = preset(settings, model)
        if not found.model:
            raise UsageError(
                f"the preset {model} names no model; write `--preset {model}` behind one, or "
                f"model = ... into [{PRESETS}.{model}] of {settings.path}"
            )
        return found.model, found
    return model, None if named is None else preset(settings, named)


def served(
    settings: Settings, models: Sequence[str], named: Sequence[str]
) -> tuple[list[str], list[Preset]]:
    """The same for a server, which has several of both."""
    found: list[str] = []
    presets: dict[str, Preset] = {}
    for model in models:
        reference, own = chosen(settings, model, None)
        if own is not None:
            presets[own.name] = own
        if own is None or reference not in found:
            found.append(reference)
    for name in named:
        presets[name] = preset(settings, name)
    return found, list(presets.values())


def asked(
    call: typer.Context, values: Mapping[str, Any]
) -> tuple[SamplingDefaults, SamplingDefaults]:
    """Sampling options of a command, apart by where they are from: what the command line or a
    variable says, and what ``sartor.toml`` says, which a preset comes before."""
    from sartor.graph import SamplingDefaults

    settings = settings_of(call)
    filed = {}
    for name, value in values.items():
        source = call.get_parameter_source(name)
        if source is not None and source.name == "DEFAULT_MAP" and settings.is_from_file(name):
            filed[name] = value
    given = {name: value for name, value in values.items() if name not in filed}
    return SamplingDefaults(**given, origin="option"), SamplingDefaults(**filed, origin=FILE)


def _sampling(given: Mapping[str, Any], where: str, name: str) -> SamplingDefaults:
    from sartor.graph import SAMPLING_LIMITS, SamplingDefaults

    known = {*SAMPLING_LIMITS, *_TEXTS, "template"}
    for key in given:
        if key not in SAMPLING_LIMITS:
            listed = ", ".join(sorted(known))
            hint = near(key, known) or f"; it may have {listed}"
            raise UsageError(f"{where} {key}: a preset has no such key{hint}")
    try:
        return SamplingDefaults(**given, origin=f"preset {name}")
    except UsageError as error:
        raise UsageError(f"{where} {error}") from None


def _located(model: str, file: Path) -> str:
    """Paths that begin with a dot start where the file lies."""
    if model in (".", "..") or model.startswith(("./", "../", ".\\", "..\\")):
        return str(file.parent / model)
    return os.path.expanduser(model)
