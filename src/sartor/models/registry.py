"""The registry of architectures: one entry for each model file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import numpy as np
import numpy.typing as npt

from sartor.errors import UnsupportedError
from sartor.formats import Checkpoint
from sartor.graph import Program
from sartor.models.config import ModelConfig
from sartor.ops.weights import Weight

MODEL_FILES = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma3",
    "phi3",
    "glm4",
    "bert",
    "qwen3_next",
    "granite_hybrid",
    "granite",
    "olmo2",
    "gemma2",
    "smollm3",
    "mixtral",
    "qwen3_moe",
    "qwen2_moe",
    "olmoe",
    "gpt_oss",
    "deepseek",
)
"""Modules of this folder; each defines ``ARCHITECTURE``."""


class UnknownArchitectureError(UnsupportedError):
    """No model file implements the architecture; that of a known one's option is another error."""


@dataclass(frozen=True)
class TensorPlace:
    """Where a weight of a program lies in a checkpoint.

    tensor   the tensor, or several of one shape that are stacked (experts that lie apart)
    rows     the rows of each tensor that are taken, in this order; None takes all
    shape    the shape that each tensor must have; None: that of the weight in the program
    convert  makes the weight of what was read (transposition, another parametrisation); it may
             widen what is quantised, and then says so in the model file
    """

    tensor: str | tuple[str, ...]
    rows: npt.NDArray[np.int64] | slice | None = None
    shape: tuple[int, ...] | None = None
    convert: Callable[[Weight], Weight] | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.tensor,) if isinstance(self.tensor, str) else self.tensor


@dataclass(frozen=True)
class Architecture:
    """A model file's entry.

    hf_names     classes that config.json may name; gguf_names: values of general.architecture
    models       models of this architecture, for people
    features     what it implements, for people
    configure    reads the configuration of a checkpoint, and refuses options by name
    build        builds the program; its weights have the names of Hugging Face checkpoints
    locate       finds a weight of the program in the checkpoint
    ignored      patterns of tensors that the program has no use for
    """

    name: str
    hf_names: tuple[str, ...]
    gguf_names: tuple[str, ...]
    models: tuple[str, ...]
    features: tuple[str, ...]
    configure: Callable[[Checkpoint], ModelConfig]
    build: Callable[[ModelConfig], Program]
    locate: Callable[[str, Checkpoint, ModelConfig], TensorPlace]
    ignored: tuple[str, ...] = ()


def architectures() -> tuple[Architecture, ...]:
    """Every architecture; model files are imported at the first call."""
    return tuple(map(_entry, MODEL_FILES))


@cache
def _entry(name: str) -> Architecture:
    entry = import_module(f"sartor.models.{name}").ARCHITECTURE
    assert isinstance(entry, Architecture)
    return entry


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """The architecture of a checkpoint; UnknownArchitectureError lists the known ones."""
    names: list[str] = []
    wanted = _plain(checkpoint.architecture)
    # A file that is called like the architecture first: most starts then import only that one.
    for name in sorted(MODEL_FILES, key=lambda name: _plain(name) not in wanted):
        entry = _entry(name)
        known = entry.gguf_names if checkpoint.kind == "gguf" else entry.hf_names
        if checkpoint.architecture in known:
            return entry
        names += known
    raise UnknownArchitectureError(
        f"{checkpoint.path}: architecture {checkpoint.architecture!r} is not supported; "
        f"supported are {', '.join(names)}"
    )


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
