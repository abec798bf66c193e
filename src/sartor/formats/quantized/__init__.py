"""Checkpoints that come quantised: each layout is read into the canonical weight formats.

A layout is a function that finds, in the tensors of a checkpoint, the weights that it stores in
several parts (codes, scales, zero points). Nothing is rounded: codes stay as they are, scales
become float32. Modules that are not quantised keep their tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from sartor.errors import FormatError
from sartor.formats.quantized import awq, compressed_tensors, fp8, gptq, mxfp4
from sartor.formats.quantized.base import Quantized, Settings, Tensors

LAYOUTS: Mapping[str, Callable[[Settings, Tensors], Iterator[Quantized]]] = MappingProxyType(
    {
        "gptq": gptq.find,
        "awq": awq.find,
        "compressed-tensors": compressed_tensors.find,
        "fp8": fp8.find,
        "mxfp4": mxfp4.find,
    }
)
"""By ``quant_method`` of config.json."""


def quantized_weights(
    config: Mapping[str, object], where: str, tensors: Tensors
) -> list[Quantized]:
    """The weights that the ``quantization_config`` of a config.json speaks of; none without one.

    Reads shapes, not weights. Errors: :class:`UnsupportedError` for a layout or an option that is
    not implemented, :class:`FormatError` for tensors that do not fit, naming file and tensor.
    """
    text = config.get("text_config")
    found = config.get("quantization_config")
    if found is None and isinstance(text, dict):
        found = text.get("quantization_config")
    if found is None:
        return []
    if not isinstance(found, dict):
        raise FormatError(f"{where}: quantization_config is no object")
    settings = Settings(found, f"{where}: quantization_config")
    method = settings.text("quant_method")
    if method not in LAYOUTS:
        raise settings.refusal(f"quant_method = {method!r}")
    weights = list(LAYOUTS[method](settings, tensors))
    if not weights:
        raise FormatError(
            f"{settings.where}: says {method}, but no tensor is stored so; the checkpoint does "
            "not match its configuration"
        )
    for weight in weights:
        if weight.info.name in tensors and weight.info.name not in weight.parts:
            raise FormatError(
                f"{weight.info.file}: tensor {weight.info.name!r} is stored twice, plain and as "
                f"{weight.parts[0]!r}"
            )
    return weights


__all__ = ["LAYOUTS", "Quantized", "Tensors", "quantized_weights"]
