"""From a checkpoint folder to a model of ``transformers``, strictly and without foreign code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sartor.errors import FormatError, SartorError, UnsupportedError
from sartor.formats import Checkpoint

UNSTATED_CONTEXT = 8192
"""Longest sequence in tokens of a model that states no limit: recurrent ones, and those whose
positions are a bias of the attention. ``max_context`` may set a lower one."""

_CONTEXT_KEYS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"),
    *("seq_length", "context_length"),
)
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_SHOWN = 4


def check_known(checkpoint: Checkpoint) -> None:
    """UnsupportedError where ``transformers`` has no causal language model for a checkpoint."""
    kind = checkpoint.metadata.get("model_type")
    name = checkpoint.architecture
    version = transformers.__version__
    configurations: Any = transformers.CONFIG_MAPPING
    if not isinstance(kind, str) or kind not in configurations:
        if "auto_map" in checkpoint.metadata:
            raise UnsupportedError(
                f"{checkpoint.path}: {name} is defined by Python code inside the checkpoint, "
                "which is never run; use a model that transformers itself has, or its GGUF"
            )
        raise UnsupportedError(
            f"{checkpoint.path}: architecture {name!r} (model_type {kind!r}) is known neither to "
            f"Sartor nor to transformers {version}; a newer transformers may know it"
        )
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if known != name:
        instead = f"; of its kind that is {known}" if known else ""
        raise UnsupportedError(
            f"{checkpoint.path}: {name} is no causal language model in transformers "
            f"{version}{instead}; only those run without a model file of Sartor's own"
        )


def read_config(checkpoint: Checkpoint) -> Any:
    """The PretrainedConfig of a folder; SartorError says what stopped ``transformers``."""
    auto: Any = transformers.AutoConfig
    try:
        return auto.from_pretrained(str(checkpoint.path), **_LOCAL)
    except Exception as error:
        raise _stopped(checkpoint, error) from error


def load_pretrained(checkpoint: Checkpoint, config: Any, device: str) -> Any:
    """The PreTrainedModel of a folder, in evaluation mode on ``device``.

    The precision is the checkpoint's, except for fp16 on a CPU, which computes it slowly:
    float32. FormatError names weights that are missing or misshapen, SartorError says what
    stopped ``transformers``.
    """
    dtype = config.dtype or config.get_text_config().dtype or torch.float32
    if dtype == torch.float16 and device == "cpu":
        dtype = torch.float32
    auto: Any = transformers.AutoModelForCausalLM
    try:
        model, report = auto.from_pretrained(
            str(checkpoint.path),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **_LOCAL,
        )
        model = model.to(device).eval()
    except Exception as error:  # of any kind: the library's, torch's, a quantiser's
        raise _stopped(checkpoint, error) from error
    # What is missing would be filled with random numbers.
    for fault in ("missing_keys", "mismatched_keys"):
        if report[fault]:
            names = sorted(key if isinstance(key, str) else str(key[0]) for key in report[fault])
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise FormatError(
                f"{checkpoint.path}: {fault.removesuffix('_keys')} weights of "
                f"{checkpoint.architecture}: {', '.join(names[:_SHOWN])}{more}; the checkpoint "
                "does not match its configuration"
            )
    return model


def _stopped(checkpoint: Checkpoint, error: Exception) -> SartorError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return SartorError(
        f"{checkpoint.path}: transformers {transformers.__version__} cannot load "
        f"{checkpoint.architecture}: {reason}"
    )


def context_length(config: Any) -> int:
    """Longest prompt + output, in tokens."""
    for key in _CONTEXT_KEYS:
        value = getattr(config.get_text_config(), key, None)
        if isinstance(value, int) and value > 0:
            return value
    return UNSTATED_CONTEXT


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and no advice of the library on the screen; afterwards all is as it was."""
    log: Any = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
