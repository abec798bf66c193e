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

from sartor.engine.fallback.model import NO_ADAPTERS, FallbackModel
from sartor.engine.module_patterns import matches
from sartor.errors import FormatError, UnsupportedError, UsageError
from sartor.formats.files import MappedFile, TensorInfo, dense_weight
from sartor.formats.safetensors import read_header, read_json
from sartor.graph import LowRank, Program
from sartor.graph.batch import F32
from sartor.models import Model
from sartor.models.blocks import EMBEDDING
from sartor.models.modules import LinearModules, Part, running
from sartor.ops.weights import FloatName

_FLOATS: Mapping[str, FloatName] = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)(?:\.default)?\.weight")
_BASE = re.compile(r"base_model\.model\.(.+?)(?:\.base_layer)?\.weight")
_EMBEDDING = re.compile(r"base_model\.model\.(.+)\.lora_embedding_[AB]")
_EMBEDDINGS = ("embed_tokens", "lm_head")
_READ = {"alpha_pattern", "bias", "ensure_weight_tying", "init_lora_weights", "lora_alpha"}
_READ |= {"peft_type", "r", "rank_pattern", "use_rslora"}
_NOTES = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
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

_MEANINGS: Mapping[str, str] = {
    "alora_invocation_tokens": "it works from these tokens on only",
    "fan_in_fan_out": "it adapts layers whose weights are stored transposed",
    "layer_replication": "it repeats layers of the model",
    "lora_bias": "its layers have biases",
    "modules_to_save": "it replaces whole layers",
    "target_parameters": "it adapts weights of experts, which are run together",
    "trainable_token_indices": "it replaces rows of the embedding",
    "use_dora": "DoRA also changes the length of each row of a weight",
    "use_qalora": "it averages the inputs of its layers",
}
"""What the better known of the other options do."""

_MERGE = "merge the adapter into the model (merge_and_unload of PEFT) and use that"

_INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")
"""Ways to initialise that leave the base model as it is."""

_MOST = 1e9
_ROWS_AT_ONCE = 4096
_SAME_ROWS = 0.5
"""Rows of an embedding are the model's own where they differ by less than this share of their
length: quantising to two bits changes them by less, training new tokens by more."""


def read_peft(
    folder: Path, model: Model | FallbackModel, program: Program | None = None
) -> dict[str, LowRank]:
    """The low-rank layers of a saved adapter, by the names of the weights that they adapt.

    ``program`` is the one that runs, where it is not the model's own (a head that was quantised
    again). ``lora_alpha / r`` (or ``/ sqrt(r)``) is folded into ``up``. An adapter of a module that
    the program has in several parts becomes one of each.

    Errors: UsageError (no such folder), FormatError (damaged, incomplete), UnsupportedError (an
    option, or a layer that cannot be adapted), each naming the file and the option or module.
    """
    if isinstance(model, FallbackModel):
        raise UnsupportedError(f"{folder}: {NO_ADAPTERS}")
    where = folder / CONFIG_NAME
    config = read_json(where)
    _check(config, where)
    saved = _Saved(folder)
    modules = LinearModules(model)
    layers: dict[str, LowRank] = {}
    for module, (down, up) in saved.pairs.items():
        parts = modules.find(module)
        if not parts:
            raise UnsupportedError(
                f"{folder}: {module} cannot be adapted: {modules.refusal(module)}"
            )
        rank = _number(config, "r", "rank_pattern", module, where)
        if len(down) != rank or up.shape[1:] != (rank,):
            raise FormatError(
                f"{folder}: {module}: lora_A {list(down.shape)} and lora_B {list(up.shape)} are "
                f"not of rank {rank:g}, which {CONFIG_NAME} states"
            )
        alpha = _number(config, "lora_alpha", "alpha_pattern", module, where)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        scaled = up * np.float32(scale)
        _check_rows(folder, module, scaled, parts)
        for name, rows in running(program or model.program, parts):
            if name in layers:
                raise FormatError(f"{folder}: {module} adapts a layer that another one adapts too")
            layers[name] = LowRank(down, scaled if rows is None else scaled[rows])
    if config.get("ensure_weight_tying") and model.config.tied_head:
        tied = [name for name in saved.pairs if name.split(".")[-1] in _EMBEDDINGS]
        if tied:
            raise UnsupportedError(
                f"{where}: ensure_weight_tying = True with an adapter of {tied[0]} is not "
                f"implemented: the embedding would be adapted too; {_MERGE}"
            )
    for name, info in saved.base.items():
        _check_base(saved.file, name, info, model, modules)
    return layers


def _check(config: Mapping[str, object], where: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"{where}: peft_type {kind!r} is not implemented; LORA is: {_MERGE}")
    if config.get("bias", "none") != "none":
        raise UnsupportedError(
            f"{where}: bias = {config['bias']!r} is not implemented: it changes biases of the "
            f"model; {_MERGE}"
        )
    initial = config.get("init_lora_weights")
    if initial not in _INITIAL:
        raise UnsupportedError(
            f"{where}: init_lora_weights = {initial!r} changes the base model; convert the "
            "adapter to plain LoRA when saving it"
        )
    for key in sorted(set(config) - _READ - _NOTES):
        if config[key]:
            meaning = f": {_MEANINGS[key]}" if key in _MEANINGS else ""
            raise UnsupportedError(
                f"{where}: {key} = {config[key]!r} is not implemented{meaning}; {_MERGE}"
            )


class _Saved:
    """The tensors of an adapter.

    ``pairs`` are the two matrices of every adapted module; ``base`` the weights of the model's
    embedding and head that PEFT saves beside an adapter of one of them.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / WEIGHTS_NAME
        if not path.exists():
            other = "; a pickled adapter_model.bin is not read, save it as safetensors"
            found = (folder / "adapter_model.bin").exists()
            raise UsageError(f"{folder}: holds no {WEIGHTS_NAME}{other if found else ''}")
        self.file = MappedFile.open(path)
        self.base: dict[str, TensorInfo] = {}
        halves: dict[str, dict[str, F32]] = {}
        for name, info in read_header(self.file)[0].items():
            match = _TENSOR.fullmatch(name)
            if match is not None:
                halves.setdefault(match[1], {})[match[2]] = _matrix(self.file, info)
                continue
            match = _BASE.fullmatch(name)
            if match is None or match[1].split(".")[-1] not in _EMBEDDINGS:
                raise UnsupportedError(_refused_tensor(path, name))
            self.base[match[1]] = info
        for module, parts in halves.items():
            if len(parts) != 2:
                (missing,) = {"A", "B"} - set(parts)
                raise FormatError(f"{path}: {module} has no lora_{missing}; the file is incomplete")
        self.pairs = {module: (parts["A"], parts["B"]) for module, parts in halves.items()}


def _refused_tensor(path: Path, name: str) -> str:
    match = _EMBEDDING.match(name)
    if match is not None:
        return (
            f"{path}: tensor {name}: {match[1]} is an embedding, and only linear layers can be "
            f"adapted; {_MERGE}"
        )
    return (
        f"{path}: tensor {name} is no part of a plain LoRA of a linear layer; biases, magnitudes "
        f"(DoRA) and whole modules are not implemented; {_MERGE}"
    )


def _check_rows(folder: Path, module: str, up: F32, parts: list[Part]) -> None:
    """Rows that a module has too few of must not be an error of numpy."""
    for rows in (part.rows for part in parts):
        last = -1 if rows is None or isinstance(rows, slice) else int(rows.max(initial=-1))
        if last >= len(up):
            raise UsageError(
                f"{folder}: {module}: lora_B {list(up.shape)} has fewer rows than the layer; check "
                "that the adapter was made for this model"
            )


def _check_base(
    file: MappedFile, module: str, info: TensorInfo, model: Model, modules: LinearModules
) -> None:
    """An embedding or head that was saved with an adapter must be the model's own."""
    found = modules.find(module)
    name = found[0].weight if found else EMBEDDING
    shape = next(spec.shape for spec in model.program.weights if spec.name == name)
    if info.shape == shape and _FLOATS.get(info.stored) and _same_rows(file, info, model, name):
        return
    raise UnsupportedError(
        f"{file.path}: tensor {info.name} of shape {list(info.shape)} replaces {module} of the "
        f"model, of shape {list(shape)}, which is not implemented; {_MERGE}"
    )


def _same_rows(file: MappedFile, info: TensorInfo, model: Model, name: str) -> bool:
    saved, own = dense_weight(info, file, _FLOATS[info.stored]), model.source.weight(name)
    for start in range(0, len(saved.data), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        theirs, ours = saved.rows(rows).dequantize(), own.rows(rows).dequantize()
        lengths = np.linalg.norm(ours, axis=1)
        if np.any(np.linalg.norm(theirs - ours, axis=1) > _SAME_ROWS * lengths):
            return False
    return True


def _matrix(file: MappedFile, info: TensorInfo) -> F32:
    if len(info.shape) != 2:
        raise UnsupportedError(
            f"{file.path}: tensor {info.name} has shape {list(info.shape)}; only linear layers "
            "can be adapted"
        )
    if info.stored in _FLOATS:
        return dense_weight(info, file, _FLOATS[info.stored]).dequantize()
    raise UnsupportedError(
        f"{file.path}: tensor {info.name}: dtype {info.stored} is not supported; save it in F32, "
        "F16 or BF16"
    )


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
            found = matches(expression, module)
        except FormatError as error:
            raise FormatError(f"{where}: {pattern}: {error}") from None
        if found:
            value = special
            break
    # A rank beyond that has no tensor, and no float can hold every integer that JSON can.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _MOST:
        raise FormatError(
            f"{where}: {key} of {module} is {value!r}; it must be a positive number below {_MOST:g}"
        )
    return value
