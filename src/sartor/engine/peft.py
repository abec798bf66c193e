"""Adapters as PEFT saves them: a folder with ``adapter_config.json`` and safetensors.

Source: the LoRA configuration and saved layout of the ``peft`` library. What changes the
meaning of an adapter and is not implemented is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sartor.engine.fallback.model import NO_ADAPTERS, FallbackModel
from sartor.errors import FormatError, UnsupportedError, UsageError
from sartor.formats.files import MappedFile, TensorInfo, dense_weight
from sartor.formats.safetensors import read_header, read_json
from sartor.graph import LowRank
from sartor.graph.batch import F32
from sartor.models import Model

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")
_READ = {"alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "peft_type", "r"}
_READ |= {"rank_pattern", "use_rslora"}
_NOTES = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
"""Options about training, or about which layers were chosen: the tensors tell that."""

_INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")
"""Ways to initialise that leave the base model as it is."""


def read_peft(folder: Path, model: Model | FallbackModel) -> dict[str, LowRank]:
    """The low-rank layers of a saved adapter, by the model's names of the weights they adapt.

    ``lora_alpha / r`` (or ``/ sqrt(r)``) is folded into ``up``. Where the checkpoint stores
    several weights as one tensor, an adapter of that tensor becomes one of each.

    Errors: UsageError (no such folder), FormatError (damaged, incomplete), UnsupportedError (an
    option, or a layer that cannot be adapted), each naming the file and the option or module.
    """
    if isinstance(model, FallbackModel):
        raise UnsupportedError(f"{folder}: {NO_ADAPTERS}")
    where = folder / CONFIG_NAME
    config = read_json(where)
    _check(config, where)
    pairs = _pairs(folder)
    places = _places(model)
    layers: dict[str, LowRank] = {}
    for module, (down, up) in pairs.items():
        rank = _number(config, "r", "rank_pattern", module, where)
        if len(down) != rank or up.shape[1:] != (rank,):
            raise FormatError(
                f"{folder}: {module}: lora_A {list(down.shape)} and lora_B {list(up.shape)} are "
                f"not of rank {rank:g}, which {CONFIG_NAME} states"
            )
        alpha = _number(config, "lora_alpha", "alpha_pattern", module, where)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        scaled = up * np.float32(scale)
        if f"{module}.weight" not in places:
            raise UnsupportedError(
                f"{folder}: {module} cannot be adapted: the model has no linear layer of this "
                "name; check that the adapter was made for this model"
            )
        for name, rows in places[f"{module}.weight"]:
            layers[name] = LowRank(down, scaled if rows is None else scaled[rows])
    return layers


def _check(config: Mapping[str, object], where: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"{where}: peft_type {kind!r} is not implemented; LORA is")
    if config.get("bias", "none") != "none":
        raise UnsupportedError(f"{where}: bias = {config['bias']!r} is not implemented")
    initial = config.get("init_lora_weights")
    if initial not in _INITIAL:
        raise UnsupportedError(
            f"{where}: init_lora_weights = {initial!r} changes the base model; convert the "
            "adapter to plain LoRA when saving it"
        )
    for key in sorted(set(config) - _READ - _NOTES):
        if config[key]:
            raise UnsupportedError(f"{where}: {key} = {config[key]!r} is not implemented")


def _pairs(folder: Path) -> dict[str, tuple[F32, F32]]:
    """The two matrices of every adapted module."""
    path = folder / WEIGHTS_NAME
    if not path.exists():
        other = "; a pickled adapter_model.bin is not read, save it as safetensors"
        found = (folder / "adapter_model.bin").exists()
        raise UsageError(f"{folder}: holds no {WEIGHTS_NAME}{other if found else ''}")
    file = MappedFile.open(path)
    tensors, _ = read_header(file)
    halves: dict[str, dict[str, F32]] = {}
    for name, info in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise UnsupportedError(
                f"{path}: tensor {name} is no part of a plain LoRA of a linear layer; embedding "
                "layers, biases, magnitudes (DoRA) and whole modules are not implemented"
            )
        halves.setdefault(match[1], {})[match[2]] = _matrix(file, info)
    for module, parts in halves.items():
        if len(parts) != 2:
            (missing,) = {"A", "B"} - set(parts)
            raise FormatError(f"{path}: {module} has no lora_{missing}; the file is incomplete")
    return {module: (parts["A"], parts["B"]) for module, parts in halves.items()}


def _matrix(file: MappedFile, info: TensorInfo) -> F32:
    if len(info.shape) != 2:
        raise UnsupportedError(
            f"{file.path}: tensor {info.name} has shape {list(info.shape)}; only linear layers "
            "can be adapted"
        )
    for dtype in ("fp32", "fp16", "bf16"):
        if info.stored == dtype:
            return dense_weight(info, file, dtype).dequantize()
    raise UnsupportedError(
        f"{file.path}: tensor {info.name}: dtype {info.stored} is not supported; save it in F32, "
        "F16 or BF16"
    )


Rows = npt.NDArray[np.int64] | slice | None


def _places(model: Model) -> dict[str, list[tuple[str, Rows]]]:
    """Weights of linear layers by the names that adapters have for them: which weights of the
    program, and which rows of the tensor each of them takes."""
    specs = model.program.weight_values()
    found: dict[str, list[tuple[str, Rows]]] = {}
    linear = []
    for node in model.program.nodes:
        if node.op == "linear":
            name = specs[node.inputs[1]].name
            place = model.source.place(name)
            # What is converted (transposed, say) is adapted in a form of its own.
            if place.convert is None and isinstance(place.tensor, str):
                linear.append(name)
                found.setdefault(place.tensor, []).append((name, place.rows))
    for name in linear:
        # A GGUF names tensors its own way and orders rows its own way, but adapters are made
        # with the names and the order of Hugging Face checkpoints, which programs have too.
        found.setdefault(name, [(name, None)])
    return found


def _number(
    config: Mapping[str, object], key: str, pattern: str, module: str, where: Path
) -> float:
    """A number of the configuration, or what its pattern says for a module."""
    value = config.get(key)
    patterns = config.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise FormatError(f"{where}: {pattern} is no object")
    for expression, special in patterns.items():
        try:
            matches = re.match(rf"(.*\.)?({expression})$", module)
        except re.error as error:
            raise FormatError(f"{where}: {pattern}: {expression!r}: {error}") from None
        if matches:
            value = special
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise FormatError(f"{where}: {key} of {module} is {value!r}; it must be a positive number")
    return value
