"""GPT-OSS (arXiv:2508.10925): attention with sinks, every other layer with a window, experts.

Checkpoints store gate and up rows of the experts by turns in one tensor: MXFP4 as published
``[experts, 2 * size, hidden]``, in plain floats with the last two axes swapped.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from sartor.errors import FormatError
from sartor.formats import Checkpoint
from sartor.graph import Program
from sartor.models import experts, gguf, huggingface
from sartor.models.config import ExpertsConfig, LayerConfig, ModelConfig
from sartor.models.options import Options
from sartor.models.registry import Architecture, TensorPlace
from sartor.models.rope import GGUF_TRUNCATE
from sartor.ops.functions import GATE_ALPHA, GATE_LIMIT
from sartor.ops.weights import Weight

_SINKS = ".self_attn.attention.sinks"
_EXPERTS = re.compile(r"(.+\.mlp\.experts)\.(gate|up|down)_proj\.(weight|bias)")
_TURNS = {"gate": slice(0, None, 2), "up": slice(1, None, 2), "down": slice(None)}
_GGUF_PARTS: Mapping[str, str] = {
    **gguf.LAYER_PARTS,
    "post_attention_layernorm": "post_attention_norm",
}
_GGUF_SCORE = 3  # llama.cpp: softmax over the chosen experts


def configure(checkpoint: Checkpoint) -> ModelConfig:
    return _from_gguf(checkpoint) if checkpoint.kind == "gguf" else _from_hf(checkpoint)


def _from_hf(checkpoint: Checkpoint) -> ModelConfig:
    """Defaults are those of transformers' GptOssConfig."""
    options = huggingface.hf_options(checkpoint)
    options.require("hidden_act", "silu")
    options.require("swiglu_alpha", GATE_ALPHA)
    options.require("swiglu_limit", GATE_LIMIT)
    if options.raw("rope_parameters") is None and options.raw("rope_scaling") is None:
        raise FormatError(
            f"{options.where}: rope_scaling is missing; the configuration is incomplete"
        )
    layers = huggingface.hf_layer_count(checkpoint, options)
    window = options.window("sliding_window", 128)
    types = options.texts("layer_types") or tuple(
        "full_attention" if index % 2 else "sliding_attention" for index in range(layers)
    )
    bias = options.flag("attention_bias", True)
    config = huggingface.hf_config(
        checkpoint,
        "gpt_oss",
        windows=huggingface.windows_of_types(options, types, layers, window),
        head_dim=64,
        theta=150000.0,
        qkv_bias=bias,
        output_bias=bias,
    )
    found = _experts(
        options.size("num_local_experts", options.size("num_experts", 128)),
        options.size("num_experts_per_tok", 4),
        config.ffn_size,
    )
    config = dataclasses.replace(
        config,
        norm_eps=options.positive("rms_norm_eps", 1e-5),
        activation="clamped_silu",
    )
    return experts.with_experts(config, found)


def _experts(count: int, used: int, size: int) -> ExpertsConfig:
    return ExpertsConfig(count, used, size, router_bias=True, bias=True)


def _from_gguf(checkpoint: Checkpoint) -> ModelConfig:
    options = gguf.gguf_options(checkpoint)
    options.require("expert_gating_func", 0, _GGUF_SCORE)
    config = gguf.gguf_config(
        checkpoint,
        options,
        "gpt_oss",
        qkv_bias=gguf.has_biases(checkpoint, "attn_q", "attn_k", "attn_v"),
        output_bias=gguf.has_biases(checkpoint, "attn_output"),
        activation="clamped_silu",
    )
    found = _experts(
        options.size("expert_count"),
        options.size("expert_used_count"),
        options.size("expert_feed_forward_length", config.ffn_size),
    )
    layers, notes = _gguf_layers(config, options)
    config = dataclasses.replace(config, layers=layers, notes=notes)
    gguf.refuse_unread(options)
    return experts.with_experts(config, found)


def _gguf_layers(
    config: ModelConfig, options: Options
) -> tuple[tuple[LayerConfig, ...], tuple[str, ...]]:
    """Files do not say which layers have a window: it belongs to the architecture. Nor do they say
    that YaRN's ramp is not cut to integers, as in the published models; the second result is a
    note of that."""
    window = options.size("attention.sliding_window")
    rope = config.layers[0].rope
    assert rope is not None
    notes: tuple[str, ...] = ()
    if rope.kind == "yarn" and options.raw(GGUF_TRUNCATE) is None:
        rope = dataclasses.replace(rope, truncate=False)
        notes = (
            f"the file has no {options.prefix}{GGUF_TRUNCATE}: false is assumed, as in OpenAI's "
            "own GPT-OSS (a model trained with true gives worse answers to long prompts)",
        )
    layers = tuple(
        LayerConfig(rope, 0 if index % 2 else window) for index in range(len(config.layers))
    )
    return layers, notes


def build(config: ModelConfig) -> Program:
    return experts.sparse_decoder(config, sinks=True)


def locate(name: str, checkpoint: Checkpoint, config: ModelConfig) -> TensorPlace:
    if checkpoint.kind == "gguf":
        if name.endswith(_SINKS):
            layer = name.removeprefix("model.layers.").removesuffix(_SINKS)
            return TensorPlace(f"blk.{layer}.attn_sinks.weight")
        return TensorPlace(gguf.gguf_name(name, _GGUF_PARTS))
    match = _EXPERTS.fullmatch(name)
    if match is not None:
        prefix, part, kind = match.groups()
        return _expert_place(prefix, part, kind, checkpoint, config)
    name = name.replace(_SINKS, ".self_attn.sinks")
    return TensorPlace(name.replace(".mlp.gate.", ".mlp.router."))


def _expert_place(
    prefix: str, part: str, kind: str, checkpoint: Checkpoint, config: ModelConfig
) -> TensorPlace:
    assert config.experts is not None
    size, hidden = config.experts.size, config.hidden_size
    rows, columns = (hidden, size) if part == "down" else (2 * size, hidden)
    tensor = f"{prefix}.{'down' if part == 'down' else 'gate_up'}_proj"
    turns = _TURNS[part]
    if kind == "bias":
        shape: tuple[int, ...] = (config.experts.count, rows)
        return TensorPlace(
            f"{tensor}_bias", shape=shape, convert=lambda w: experts.second_axis(w, turns)
        )
    swapped = tensor not in checkpoint.names() or _is_plain(checkpoint, tensor)
    shape = (columns, rows) if swapped else (rows, columns)

    def convert(weight: Weight) -> Weight:
        if swapped:
            data = np.swapaxes(weight.data, 1, 2)
            weight = dataclasses.replace(weight, data=data)
        return experts.second_axis(weight, turns)

    return TensorPlace(tensor, shape=(config.experts.count, *shape), convert=convert)


def _is_plain(checkpoint: Checkpoint, tensor: str) -> bool:
    return checkpoint.info(tensor).stored in ("fp32", "fp16", "bf16")


ARCHITECTURE = Architecture(
    name="gpt_oss",
    hf_names=("GptOssForCausalLM",),
    gguf_names=("gpt-oss",),
    models=("GPT-OSS 20B and 120B",),
    features=("attention sinks", "alternating windows", "experts with biases", "MXFP4"),
    configure=configure,
    build=build,
    locate=locate,
    ignored=huggingface.IGNORED + gguf.IGNORED,
)
