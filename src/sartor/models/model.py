"""A model: the program that a checkpoint's architecture builds, and where its weights lie."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from sartor.errors import FormatError
from sartor.formats import Checkpoint
from sartor.graph import Program
from sartor.models.blocks import HEAD
from sartor.models.config import ModelConfig
from sartor.models.registry import Architecture, TensorPlace, architecture_of
from sartor.ops.weights import Weight, WeightFormat, stack

_SHOWN = 8


class WeightSource:
    """The weights of a program, read from a checkpoint, by the program's names.

    Strict: tensors that are missing, left over or misshapen are a FormatError that names them,
    raised here and not when the weight is read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        program: Program,
        architecture: Architecture,
        config: ModelConfig,
    ) -> None:
        self._checkpoint = checkpoint
        self._architecture = architecture
        self._config = config
        self._names = [spec.name for spec in program.weights]
        self._places = {
            spec.name: architecture.locate(spec.name, checkpoint, config)
            for spec in program.weights
        }
        stored = set(checkpoint.names())
        used = {name for place in self._places.values() for name in place.tensors}
        if used - stored:
            raise FormatError(
                f"{checkpoint.path}: tensors that {architecture.name} needs are missing: "
                f"{_listed(used - stored)}; the checkpoint is incomplete"
            )
        ignored = [re.compile(pattern) for pattern in architecture.ignored]
        if config.tied_head and program.samples:
            # A copy, if there.
            used.update(architecture.locate(HEAD, checkpoint, config).tensors)
        left = {
            name
            for name in stored - used
            if not any(pattern.fullmatch(name) for pattern in ignored)
        }
        # What the model has no place for would be left out silently: a part of the model that
        # the configuration does not mention, or another architecture under this name.
        if left:
            raise FormatError(
                f"{checkpoint.path}: tensors that {architecture.name} has no place for: "
                f"{_listed(left)}; the checkpoint does not match its configuration"
            )
        for spec in program.weights:
            place = self._places[spec.name]
            wanted = place.shape or spec.shape[isinstance(place.tensor, tuple) :]
            for tensor in place.tensors:
                shape = checkpoint.info(tensor).shape
                if shape != wanted:
                    raise FormatError(
                        f"{checkpoint.path}: tensor {tensor} has shape {list(shape)}, its "
                        f"configuration needs {list(wanted)}"
                    )

    @property
    def path(self) -> Path:
        """The checkpoint's file or folder."""
        return self._checkpoint.path

    def place(self, name: str) -> TensorPlace:
        """Where a weight of the program lies in the checkpoint."""
        return self._places[name]

    def hf_place(self, name: str) -> TensorPlace:
        """Where a weight of the program lies in a Hugging Face checkpoint of this model; not for
        experts, which may lie there in several ways."""
        if self._checkpoint.kind == "safetensors":
            return self._places[name]
        stand_in = cast(Checkpoint, _HfNames(self._names))
        return self._architecture.locate(name, stand_in, self._config)

    def weight(self, name: str) -> Weight:
        """One weight in canonical form; a view of the file unless its place reorders it."""
        place = self._places[name]
        parts = [self._checkpoint.weight(tensor) for tensor in place.tensors]
        if place.rows is not None:
            parts = [part.rows(place.rows) for part in parts]
        weight = parts[0] if isinstance(place.tensor, str) else stack(name, parts)
        if place.convert is not None:
            weight = place.convert(weight)
        return dataclasses.replace(weight, name=name)

    def format(self, name: str) -> WeightFormat:
        """The format of :meth:`weight`, where possible without reading it."""
        place = self._places[name]
        if place.convert is not None or not isinstance(place.tensor, str):
            return self.weight(name).format
        return self._checkpoint.format(place.tensor)

    def identity(self) -> str:
        """The checkpoint's: cheap, and different when the files change."""
        return self._checkpoint.identity()


class _HfNames:
    """What the model files ask of a Hugging Face checkpoint to tell where a weight lies: only the
    names of its tensors, here those of the program."""

    kind: Literal["safetensors"] = "safetensors"

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def names(self) -> list[str]:
        return self._names


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


@dataclass(frozen=True)
class Model:
    """A program with its weights. ``name`` is the checkpoint's file or folder name."""

    name: str
    architecture: str
    config: ModelConfig
    program: Program
    source: WeightSource

    @property
    def context_length(self) -> int:
        """Longest prompt + output, in tokens."""
        return self.config.context_length

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def notes(self) -> tuple[str, ...]:
        """What was assumed where the checkpoint does not say it, each in one line."""
        return self.config.notes


def load_model(checkpoint: Checkpoint) -> Model:
    """Builds the program of a checkpoint; reads configuration and headers, not the weights.

    UnsupportedError names an architecture or option that is not implemented, FormatError a
    tensor that does not fit. The checkpoint must stay open as long as weights are read.
    """
    architecture = architecture_of(checkpoint)
    config = architecture.configure(checkpoint)
    program = architecture.build(config)
    source = WeightSource(checkpoint, program, architecture, config)
    name = checkpoint.path.name.removesuffix(".gguf")
    return Model(name, architecture.name, config, program, source)
