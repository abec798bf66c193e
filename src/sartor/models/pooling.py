"""What an encoder's folder says of pooling: the files of sentence-transformers.

``modules.json`` lists the steps that follow each other; ``<pooling>/config.json`` tells which
tokens make the sentence's vector; ``sentence_bert_config.json`` how long a text may be. Source:
sentence-transformers, ``models/Pooling`` and ``models/Transformer``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sartor.errors import FormatError, UnsupportedError
from sartor.models.options import Options

_MODES: Mapping[str, str] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
"""Keys of a pooling step, and the operator's kinds."""

_NOTES = ("word_embedding_dimension", "embedding_dimension", "include_prompt")
"""``include_prompt`` bears on prompts that are set apart from the text; a request has none."""


@dataclass(frozen=True)
class Pooling:
    """``kind`` is one of the operator ``pool``; ``max_length`` is in tokens, 0 where unstated."""

    kind: str = "mean"
    normalize: bool = False
    max_length: int = 0


def pooling_of(folder: Path) -> Pooling:
    """The pooling of a checkpoint folder; the mean of all tokens where nothing is said.

    UnsupportedError names a step or mode that is not implemented.
    """
    steps = _steps(folder / "modules.json")
    if not steps:
        return Pooling()
    kind, normalize = "", False
    for path, name in steps[1:]:
        if name == "Pooling" and not kind:
            config = folder / path / "config.json"
            if not config.is_file():
                raise FormatError(f"{config}: this file is missing; fetch the whole folder")
            kind = _kind(_options(config))
        elif name == "Normalize" and kind:
            normalize = True
        else:
            raise UnsupportedError(
                f"{folder / 'modules.json'}: step {name!r} is not implemented here; implemented "
                "are Transformer, Pooling and Normalize, in this order"
            )
    if steps[0][1] != "Transformer" or not kind:
        raise UnsupportedError(
            f"{folder / 'modules.json'}: the steps are {', '.join(name for _, name in steps)}; "
            "implemented are Transformer, Pooling and Normalize, in this order"
        )
    limit = _options(folder / "sentence_bert_config.json")
    stated = limit.raw("max_seq_length") is not None
    return Pooling(kind, normalize, limit.size("max_seq_length") if stated else 0)


def _kind(options: Options) -> str:
    if options.raw("pooling_mode") is not None:
        kind = options.text("pooling_mode")
        if kind not in ("mean", "cls"):
            raise options.refusal("pooling_mode", kind)
        options.refuse_unread(_NOTES)
        return kind
    chosen = [key for key in options.present() if key not in _NOTES and options.flag(key)]
    if len(chosen) != 1 or chosen[0] not in _MODES:
        raise UnsupportedError(
            f"{options.where}: pooling by {' and '.join(chosen) or 'nothing'} is not implemented; "
            f"implemented is one of {', '.join(_MODES)}"
        )
    return _MODES[chosen[0]]


def _steps(path: Path) -> list[tuple[str, str]]:
    """Folder and name of each step, first to last; none where there is no such file."""
    content = _json(path)
    if content is None:
        return []
    steps = []
    for entry in content if isinstance(content, list) else [content]:
        folder = entry.get("path") if isinstance(entry, Mapping) else None
        name = entry.get("type") if isinstance(entry, Mapping) else None
        if not isinstance(folder, str) or not isinstance(name, str) or not _is_inside(folder):
            raise FormatError(f"{path}: {entry!r} is no step with a path and a type")
        steps.append((folder, name.rpartition(".")[2]))
    return steps


def _is_inside(folder: str) -> bool:
    """A step lies in the model's folder: a path could reach any file of the machine."""
    return folder not in (".", "..") and not any(mark in folder for mark in "/\\:\0")


def _options(path: Path) -> Options:
    content = _json(path)
    if content is not None and not isinstance(content, dict):
        raise FormatError(f"{path}: must hold a JSON object; fetch the whole folder")
    return Options(content or {}, str(path))


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: cannot be read: {error}; fetch the whole folder") from None
