"""SmolLM 3: Llama's shape in which every fourth layer has no rope (arXiv:2501.18795)."""

from __future__ import annotations

import dataclasses

from sartor.formats import Checkpoint
from sartor.graph import Program
from sartor.models import gguf, huggingface
from sartor.models.blocks import decoder, pre_norm_layer
from sartor.models.config import LayerConfig, ModelConfig
from sartor.models.llama import locate
from sartor.models.options import Options
from sartor.models.registry import Architecture

_THETA = 2_000_000.0  # where config.json does not say
_PERIOD = 4  # layers; the last of each period has no rope


def configure(checkpoint: Checkpoint) -> ModelConfig:
    if checkpoint.kind == "gguf":
        options = gguf.gguf_options(checkpoint)
        config = gguf.gguf_config(checkpoint, options, "smollm3")
        gguf.refuse_unread(options)
        return _without_rope(config, _pattern(len(config.layers), _PERIOD))
    options = huggingface.hf_options(checkpoint)
    count = huggingface.hf_layer_count(checkpoint, options)
    ropes = _hf_pattern(options, count)
    bias = options.flag("attention_bias", False)
    config = huggingface.hf_config(
        checkpoint,
        "smollm3",
        windows=_hf_windows(options, ropes),
        theta=_THETA,
        tied=True,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=options.flag("mlp_bias", False),
    )
    return _without_rope(config, ropes)


def _pattern(count: int, period: int) -> tuple[bool, ...]:
    return tuple(bool((index + 1) % period) for index in range(count))


def _hf_pattern(options: Options, count: int) -> tuple[bool, ...]:
    """Which layers have a rope; ``no_rope_layers`` says 1 for those, whatever its name."""
    if options.raw("no_rope_layers") is None:
        return _pattern(count, options.size("no_rope_layer_interval", _PERIOD))
    flags = options.numbers("no_rope_layers")
    if len(flags) != count or not set(flags) <= {0.0, 1.0}:
        raise options.refusal("no_rope_layers", options.raw("no_rope_layers"))
    return tuple(bool(flag) for flag in flags)


def _hf_windows(options: Options, ropes: tuple[bool, ...]) -> tuple[int, ...]:
    """Layers without a rope may have a window; published models have none."""
    used = options.flag("use_sliding_window", False)
    window = options.window("sliding_window", 0) if used else 0
    types = options.texts("layer_types")
    if not window:
        return (0,) * len(ropes)
    if types is None:
        return tuple(0 if rope else window for rope in ropes)
    return huggingface.windows_of_types(options, types, len(ropes), window)


def _without_rope(config: ModelConfig, ropes: tuple[bool, ...]) -> ModelConfig:
    layers = tuple(
        part if rope else LayerConfig(None, part.window)
        for part, rope in zip(config.layers, ropes, strict=True)
    )
    return dataclasses.replace(config, layers=layers)


def build(config: ModelConfig) -> Program:
    return decoder(config, pre_norm_layer)


ARCHITECTURE = Architecture(
    name="smollm3",
    hf_names=("SmolLM3ForCausalLM",),
    gguf_names=("smollm3",),
    models=("SmolLM 3 3B",),
    features=("layers without rope", "biases", "sliding window by layer", "tied head"),
    configure=configure,
    build=build,
    locate=locate,
    ignored=huggingface.IGNORED + gguf.IGNORED,
)
