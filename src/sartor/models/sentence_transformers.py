"""What a folder of sentence-transformers says of its vectors: each file of it is read, and each
setting is honoured or refused by name.

    modules.json                       the modules that follow each other, and their folders
    config_sentence_transformers.json  prompts, dimensions
    sentence_bert_config.json          how texts are read: their length, lower case
    tokenizer_config.json              their length, where the file before does not state it
    FOLDER/config.json                 one for each module behind the first

``SentenceTransformer.encode`` is the reference. Source: sentence-transformers 6, ``base/model.py``,
``base/modules`` and ``sentence_transformer/modules``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sartor.errors import FormatError, UnsupportedError
from sartor.formats import small_files
from sartor.models.config import NO_PROMPTS, VectorConfig, VectorStep
from sartor.models.options import Options

_MODULES = "modules.json"
_SETTINGS = "config_sentence_transformers.json"
_LIBRARY = "sentence_transformers."
_FAMILIES = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
"""Old versions name the file of the first module by the family of the model."""

_POOLINGS: Mapping[str, str] = {
    "cls": "cls",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_length",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
"""Their names of poolings, and ours; all but "max"."""

_FLAGS: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The older spelling, one flag a pooling; in the order in which their vectors are joined."""

_ACTIVATIONS: Mapping[str, str] = {
    "Identity": "",
    "Tanh": "tanh",
    "GELU": "gelu",
    "ReLU": "relu",
    "SiLU": "silu",
    "Sigmoid": "sigmoid",
}
"""Classes behind a dense module (by the last part of their path), and kinds of the operator."""

_ACTIVATION = re.compile(r"\w+\.nn\.(?:modules\.\w+\.)?(\w+)")
_DEFAULT_ACTIVATION = "_.nn.Tanh"

_ORDER = "implemented are Transformer, Pooling, and then Dense, LayerNorm, Dropout and Normalize"


@dataclass(frozen=True)
class _Module:
    folder: str
    name: str


def vectors_of(folder: Path, width: int) -> VectorConfig | None:
    """What the files of ``folder`` say; None where it is no folder of sentence-transformers.

    ``width`` is the number of features of a token.

    Errors: FormatError for a file that is damaged or missing, UnsupportedError for a setting that
    is not implemented, each naming the file.
    """
    modules = _modules(folder / _MODULES)
    if not modules:
        return None
    if (folder / "adapter_config.json").is_file():
        raise UnsupportedError(
            f"{folder / 'adapter_config.json'}: an adapter on top of a sentence-transformers model "
            "is not implemented; merge it into the model (merge_and_unload of PEFT) and save that"
        )
    names = [module.name for module in modules]
    where = folder / _MODULES
    if names[0] != "Transformer" or len(names) == 1:
        raise UnsupportedError(f"{where}: the steps are {', '.join(names)}; {_ORDER}")
    if modules[0].folder:
        raise UnsupportedError(
            f"{where}: the model lies in the folder {modules[0].folder!r}; only a model beside "
            "modules.json is read, so load and save it with a later sentence-transformers"
        )
    if names[1] != "Pooling":
        raise UnsupportedError(f"{where}: step {names[1]!r} before Pooling; {_ORDER}")
    poolings, include_prompt = _pooling(_module_options(folder, modules[1]))
    width *= len(poolings)
    steps: list[VectorStep] = []
    for module in modules[2:]:
        if module.name not in _STEPS:
            raise UnsupportedError(
                f"{where}: step {module.name!r} is not implemented here; {_ORDER}"
            )
        step = _STEPS[module.name](_module_options(folder, module), module.folder, width)
        if step is not None:
            steps.append(step)
            width = step.width
    prompts, default, dimensions = _settings(_options(folder / _SETTINGS), width)
    max_length, limit, lower_case = _reading(folder)
    return VectorConfig(
        poolings=poolings,
        steps=tuple(steps),
        dimensions=dimensions,
        prompts=prompts,
        default_prompt=default,
        include_prompt=include_prompt,
        lower_case=lower_case,
        max_length=max_length,
        limit=limit,
    )


def _modules(path: Path) -> list[_Module]:
    """The modules, first to last; none where there is no such file."""
    content = _json(path)
    if content is None:
        return []
    if not isinstance(content, list):
        raise FormatError(f"{path}: must hold a JSON list of modules; fetch the whole folder")
    modules: list[_Module] = []
    for entry in content:
        folder = entry.get("path") if isinstance(entry, Mapping) else None
        kind = entry.get("type") if isinstance(entry, Mapping) else None
        if not isinstance(folder, str) or not isinstance(kind, str) or not _is_inside(folder):
            raise FormatError(f"{path}: {entry!r} is no step with a path and a type")
        if not kind.startswith(_LIBRARY):
            raise UnsupportedError(
                f"{path}: step {kind!r} is Python code of its own, which is not run; {_ORDER}"
            )
        unknown = sorted(set(entry) - {"idx", "name", "path", "type", "kwargs"})
        if unknown:
            raise UnsupportedError(f"{path}: option {unknown[0]!r} of a step is not implemented")
        if folder and folder in {module.folder for module in modules}:
            raise FormatError(f"{path}: two steps have the folder {folder!r}")
        modules.append(_Module(folder, kind.rpartition(".")[2]))
    return modules


def _is_inside(folder: str) -> bool:
    """A module lies in the model's folder: a path could reach any file of the machine."""
    return folder not in (".", "..") and not any(mark in folder for mark in "/\\:\0")


# Modules ------------------------------------------------------------------------------


def _pooling(options: Options) -> tuple[tuple[str, ...], bool]:
    """Poolings, and whether the tokens of a prompt take part."""
    flagged = [mode for flag, mode in _FLAGS.items() if options.flag(flag, False)]
    given = options.raw("pooling_mode")
    if given is None:
        names = flagged or ["mean"]
    elif isinstance(given, str):
        names = [given]
    elif isinstance(given, list) and given and all(isinstance(name, str) for name in given):
        names = list(given)
    else:
        raise FormatError(
            f"{options.where}: pooling_mode is {given!r}; it must be a name or a list of names"
        )
    include_prompt = options.flag("include_prompt", True)
    options.refuse_unread(("word_embedding_dimension", "embedding_dimension"))
    unknown = [name for name in names if name not in _POOLINGS]
    if unknown:
        raise UnsupportedError(
            f"{options.where}: pooling by {' and '.join(unknown)} is not implemented; implemented "
            f"are {', '.join(_POOLINGS)}"
        )
    return tuple(_POOLINGS[name] for name in names), include_prompt


def _dense(options: Options, name: str, width: int) -> VectorStep:
    _sentence_vectors(options)
    inputs, outputs = options.size("in_features"), options.size("out_features")
    if inputs != width:
        raise FormatError(
            f"{options.where}: in_features is {inputs}, but the step before gives {width}"
        )
    path = options.text("activation_function", _DEFAULT_ACTIVATION)
    match = _ACTIVATION.fullmatch(path)
    if match is None or match[1] not in _ACTIVATIONS:
        raise options.refusal("activation_function", path)
    step = VectorStep(
        "dense",
        name,
        outputs,
        bias=options.flag("bias", True),
        activation=_ACTIVATIONS[match[1]],
        residual=options.flag("use_residual", False),
    )
    options.refuse_unread()
    return step


def _layer_norm(options: Options, name: str, width: int) -> VectorStep:
    if options.size("dimension") != width:
        raise FormatError(
            f"{options.where}: dimension is {options.size('dimension')}, but the step before gives "
            f"{width}"
        )
    options.refuse_unread()
    return VectorStep("layer_norm", name, width)


def _normalize(options: Options, name: str, width: int) -> VectorStep:
    _sentence_vectors(options)
    options.refuse_unread()
    return VectorStep("normalize", width=width)


def _dropout(options: Options, name: str, width: int) -> None:
    """Only training drops anything."""
    options.refuse_unread(("dropout",))


_STEPS: Mapping[str, Callable[[Options, str, int], VectorStep | None]] = {
    "Dense": _dense,
    "LayerNorm": _layer_norm,
    "Normalize": _normalize,
    "Dropout": _dropout,
}


def _sentence_vectors(options: Options) -> None:
    """Steps on the vectors of tokens, and what would leave the vector as it was, are refused."""
    for key in ("module_input_name", "module_output_name"):
        options.require(key, "sentence_embedding")


# Settings -----------------------------------------------------------------------------


def _settings(options: Options, width: int) -> tuple[dict[str, str], str, int]:
    """Prompts, the name of the one that is used by default, and the dimensions of a vector."""
    options.require("model_type", "SentenceTransformer")
    prompts = dict(NO_PROMPTS)
    table, given = options.table("prompts"), options.raw("prompts")
    for name in given if isinstance(given, Mapping) else ():
        prompts[name] = table.text(name, "")
    default = options.text("default_prompt_name", "")
    if default and default not in prompts:
        raise FormatError(
            f"{options.where}: default_prompt_name is {default!r}, but the prompts are "
            f"{', '.join(prompts)}"
        )
    dimensions = 0
    if options.raw("truncate_dim") is not None:
        dimensions = min(options.size("truncate_dim"), width)
    # How vectors are compared is for whoever compares them.
    options.refuse_unread(("__version__", "similarity_fn_name", "requirements"))
    return prompts, default, dimensions


_MODALITIES = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
"""Text, without a chat template, and all tokens of the last layer."""

_FOR_MODEL, _FOR_TOKENIZER = ("model_args", "model_kwargs"), ("tokenizer_args", "processor_kwargs")
_FOR_CONFIG = ("config_args", "config_kwargs")
"""Tables of arguments for transformers, in their older and in their newer spelling."""


def _reading(folder: Path) -> tuple[int, str, bool]:
    """The longest text in tokens (0: not stated) and what states it; whether text is made lower
    case."""
    files = [_options(folder / f"sentence_{family}_config.json") for family in _FAMILIES]
    options = next((file for file in files if file.present()), files[0])
    options.require("transformer_task", "feature-extraction")
    options.require("module_output_name", "token_embeddings")
    options.require("modality_config", _MODALITIES)
    text = _text_arguments(options)
    stated = [(text, "max_length")]
    for table in (*_FOR_MODEL, *_FOR_TOKENIZER, *_FOR_CONFIG):
        arguments, harmless = options.table(table), ["trust_remote_code"]
        if table in _FOR_MODEL:  # how it is computed, not what
            harmless += ["attn_implementation", "add_pooling_layer"]
            harmless += [key for key in arguments.present() if key.endswith("dtype")]
        elif table in _FOR_TOKENIZER:
            harmless.append("model_max_length")
            stated.append((arguments, "model_max_length"))
        arguments.refuse_unread(harmless)
    stated.append((options, "max_seq_length"))
    lower_case = options.flag("do_lower_case", False)
    # The second is about speed; the others are for encode_query and encode_document alone.
    options.refuse_unread(("max_seq_length", "unpad_inputs", "query_length", "document_length"))
    stated.append((_options(folder / "tokenizer_config.json"), "model_max_length"))
    for holder, key in stated:
        if holder.raw(key) is not None:
            return _length(holder, key), f"{key} of {_file_of(holder)}", lower_case
    return 0, "", lower_case


def _length(options: Options, key: str) -> int:
    """A number of tokens; without a limit some files say 1e30."""
    value = options.raw(key)
    return int(value) if isinstance(value, float) and value >= 1e9 else options.size(key)


def _file_of(options: Options) -> str:
    return Path(options.where.partition(": ")[0]).name


def _text_arguments(options: Options) -> Options:
    """What is given to the tokenizer at each call."""
    processing = options.table("processing_kwargs")
    text = processing.table("text")
    processing.refuse_unread()
    text.require("truncation", True, False, "longest_first")
    text.refuse_unread(("max_length", "padding"))
    return text


# Files --------------------------------------------------------------------------------


def _module_options(folder: Path, module: _Module) -> Options:
    path = folder / module.folder / "config.json"
    if module.name in ("Pooling", "Dense", "LayerNorm"):
        if not module.folder:
            raise FormatError(f"{folder / _MODULES}: step {module.name!r} names no folder")
        if not path.is_file():
            raise FormatError(f"{path}: this file is missing; fetch the whole folder")
    # Without a folder of its own there is nothing to read: config.json is the model's there.
    return _options(path) if module.folder else Options({}, str(folder / _MODULES))


def _options(path: Path) -> Options:
    content = _json(path)
    if content is not None and not isinstance(content, dict):
        raise FormatError(f"{path}: must hold a JSON object; fetch the whole folder")
    return Options(content or {}, str(path))


def _json(path: Path) -> object:
    try:
        return small_files.parse_json(small_files.read(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read: {error}; fetch the whole folder") from None
