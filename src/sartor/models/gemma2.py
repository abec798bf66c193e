"""Gemma 2 (arXiv:2408.00118): local and global layers in turn, norms before and after each part,
soft-caps on the scores of attention and on the logits."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

from sartor.formats import Checkpoint
from sartor.graph import Program
from sartor.models import gguf, huggingface
from sartor.models.blocks import decoder
from sartor.models.config import LayerConfig, ModelConfig
from sartor.models.gemma3 import GGUF_PARTS, sandwich_layer
from sartor.models.registry import Architecture, TensorPlace

_WINDOW = 4096  # defaults are those of transformers' Gemma2Config
_HEAD_DIM = 256
_SCORES_CAP, _LOGITS_CAP = 50.0, 30.0
_LAYERS_27B = 46  # the only size whose scores are not scaled by the head's width


def configure(checkpoint: Checkpoint) -> ModelConfig:
    if checkpoint.kind == "gguf":
        return _from_gguf(checkpoint)
    options = huggingface.hf_options(checkpoint)
    options.require("use_bidirectional_attention", False)
    bias = options.flag("attention_bias", False)
    count = huggingface.hf_layer_count(checkpoint, options)
    window = options.window("sliding_window", _WINDOW)
    types = options.texts("layer_types")
    windows = _windows(count, window)
    if types is not None:
        windows = huggingface.windows_of_types(options, types, count, window)
    config = huggingface.hf_config(
        checkpoint,
        "gemma2",
        windows=windows,
        head_dim=_HEAD_DIM,
        tied=True,
        qkv_bias=bias,
        output_bias=bias,
    )
    return dataclasses.replace(
        config,
        activation=huggingface.hf_activation(options, "hidden_activation", "gelu_pytorch_tanh"),
        attention_scale=options.positive("query_pre_attn_scalar", 256) ** -0.5,
        norm_offset=1.0,
        embedding_scale=math.sqrt(config.hidden_size),
        attention_softcap=options.cap("attn_logit_softcapping", _SCORES_CAP),
        final_softcap=options.cap("final_logit_softcapping", _LOGITS_CAP),
    )


def _windows(count: int, window: int) -> tuple[int, ...]:
    """Every other layer is local, the first one to begin with."""
    return tuple(0 if index % 2 else window for index in range(count))


def _from_gguf(checkpoint: Checkpoint) -> ModelConfig:
    options = gguf.gguf_options(checkpoint)
    config = gguf.gguf_config(checkpoint, options, "gemma2", activation="gelu_tanh")
    count = len(config.layers)
    windows = _windows(count, options.window("attention.sliding_window", _WINDOW))
    scale = config.attention_scale
    if count == _LAYERS_27B:
        scale = (config.hidden_size // config.heads) ** -0.5
    config = dataclasses.replace(
        config,
        layers=tuple(LayerConfig(config.layers[0].rope, window) for window in windows),
        attention_scale=scale,
        embedding_scale=math.sqrt(config.hidden_size),
        attention_softcap=options.cap("attn_logit_softcapping", _SCORES_CAP),
        final_softcap=options.cap("final_logit_softcapping", _LOGITS_CAP),
    )
    gguf.refuse_unread(options)
    return config


def build(config: ModelConfig) -> Program:
    return decoder(config, partial(sandwich_layer, qk_norm=False))


def locate(name: str, checkpoint: Checkpoint, config: ModelConfig) -> TensorPlace:
    if checkpoint.kind == "gguf":
        return TensorPlace(gguf.gguf_name(name, GGUF_PARTS))
    return TensorPlace(name)


ARCHITECTURE = Architecture(
    name="gemma2",
    hf_names=("Gemma2ForCausalLM",),
    gguf_names=("gemma2",),
    models=("Gemma 2 2B to 27B",),
    features=("local and global layers", "soft-caps of scores and logits", "biases", "tied head"),
    configure=configure,
    build=build,
    locate=locate,
    ignored=huggingface.IGNORED + gguf.IGNORED,
)
