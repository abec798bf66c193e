"""The names that requests may ask for, and what each stands for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sartor.engine.preset import Preset
from sartor.graph import SamplingDefaults
from sartor.serving.frontend import ServedModel


@dataclass(frozen=True)
class ServedName:
    """A name, as answers show it: a model as it is, by its own name or another, with an adapter, or
    with a preset."""

    name: str
    model: ServedModel
    adapter: str = ""
    preset: Preset | None = None

    @property
    def kind(self) -> str:
        """What it is, for people."""
        return "a preset" if self.preset else "an adapter" if self.adapter else "a model"

    @property
    def stands_for(self) -> str:
        """The model, adapter or preset by its own name."""
        return self.name if self.adapter or self.preset else self.model.name

    @property
    def sampling(self) -> tuple[SamplingDefaults, ...]:
        """What applies to requests that say nothing themselves, what comes first first."""
        own = self.model.sampling
        return (own,) if self.preset is None else (self.preset.sampling, own)


def served_names(models: Mapping[str, ServedModel]) -> Iterator[ServedName]:
    """Every name that is listed: models, each with its further names, presets and adapters."""
    for model in models.values():
        for name in (model.name, *model.listed):
            yield ServedName(name, model)
        for name, preset in model.presets.items():
            yield ServedName(name, model, preset=preset)
        for name in model.adapters:
            yield ServedName(name, model, adapter=name)


def lookup(models: Mapping[str, ServedModel], name: str) -> ServedName | None:
    """What a name stands for; aliases of models count too, which need not be listed."""
    for model in models.values():
        if name == model.name or name in model.aliases:
            return ServedName(name, model)
    for model in models.values():
        if name in model.presets:
            return ServedName(name, model, preset=model.presets[name])
        if name in model.adapters:
            return ServedName(name, model, adapter=name)
    return None
