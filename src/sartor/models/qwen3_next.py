"""Qwen 3-Next: three layers of the gated delta rule (arXiv:2412.06464), then one of attention
with a gate on its output (arXiv:2505.06708); experts beside a gated shared one; norms store
``weight - 1``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sartor.errors import UnsupportedError
from sartor.formats import Checkpoint
from sartor.graph import Builder, Program, Value
from sartor.models import experts, huggingface, recurrent
from sartor.models.blocks import decoder, norm, self_attention
from sartor.models.config import ExpertsConfig, LayerConfig, ModelConfig
from sartor.models.recurrent import HybridLayer
from sartor.models.registry import Architecture, TensorPlace

_HEAD_DIM = 256  # defaults are those of transformers' Qwen3NextConfig
_ROTATED = 0.25
_L2_EPS = 1e-6
Rows = npt.NDArray[np.int64]
_PERIOD = 4  # layers; the last of each period has attention


@dataclass(frozen=True, kw_only=True)
class Qwen3NextConfig(ModelConfig):
    """Sizes of the recurrent layers."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def keys(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Features that the convolution runs over: q, k, v."""
        return 2 * self.keys + self.values


def configure(checkpoint: Checkpoint) -> ModelConfig:
    options = huggingface.hf_options(checkpoint)
    bias = options.flag("attention_bias", False)
    config = huggingface.hf_config(
        checkpoint,
        "qwen3_next",
        head_dim=_HEAD_DIM,
        partial=_ROTATED,
        qkv_bias=bias,
        output_bias=bias,
    )
    count = len(config.layers)
    period = options.size("full_attention_interval", _PERIOD)
    kinds = recurrent.recurrent_layers(options, ("layer_types",), count) or tuple(
        bool((index + 1) % period) for index in range(count)
    )
    layers = tuple(HybridLayer(config.layers[0].rope, recurrent=kind) for kind in kinds)
    key_heads = options.size("linear_num_key_heads", 16)
    value_heads = options.size("linear_num_value_heads", 32)
    if value_heads % key_heads:
        raise UnsupportedError(
            f"{options.where}: linear_num_value_heads = {value_heads} do not divide into "
            f"linear_num_key_heads = {key_heads} groups"
        )
    taps = options.size("linear_conv_kernel_dim", 4)
    if taps < 2:
        raise options.refusal("linear_conv_kernel_dim", taps)
    found = Qwen3NextConfig(
        **vars(dataclasses.replace(config, layers=layers, norm_offset=1.0)),
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=options.size("linear_key_head_dim", 128),
        value_dim=options.size("linear_value_head_dim", 128),
        taps=taps,
    )
    if options.integer("num_experts", 512) == 0:
        return found
    chosen = ExpertsConfig(
        count=options.size("num_experts", 512),
        used=options.size("num_experts_per_tok", 10),
        size=options.size("moe_intermediate_size", 512),
        normalize=options.flag("norm_topk_prob", True),
        shared_size=options.size("shared_expert_intermediate_size", 512),
    )
    return experts.with_experts(found, chosen, huggingface.hf_dense_layers(options, count))


def layer(b: Builder, x: Value, config: ModelConfig, part: LayerConfig) -> Value:
    assert isinstance(config, Qwen3NextConfig)
    assert isinstance(part, HybridLayer)
    inner = norm(b, x, config, "input_layernorm")
    if part.recurrent:
        inner = gated_delta_net(b, inner, config)
    else:
        inner = self_attention(b, inner, config, part, qk_norm=True, output_gate=True)
    x = b.add(x, inner, "attention_residual")
    inner = norm(b, x, config, "post_attention_layernorm")
    inner = experts.feed_forward(b, inner, config, part, shared_gate=True)
    return b.add(x, inner, "mlp_residual")


def gated_delta_net(b: Builder, x: Value, config: Qwen3NextConfig) -> Value:
    """Convolution over q, k, v; the recurrence; a norm of each head, gated."""
    heads, key_dim = config.value_heads, config.key_dim
    with b.scope("linear_attn"):
        qkv = b.linear(x, "in_proj_qkv", config.channels, axes=("heads", "hidden"))
        z = b.linear(x, "in_proj_z", config.values, axes=("heads", "hidden"))
        beta = b.linear(x, "in_proj_b", heads, axes=("heads", "hidden"))
        step = b.linear(x, "in_proj_a", heads, axes=("heads", "hidden"))
        qkv = b.short_conv(qkv, "conv1d", config.taps)
        qkv = b.activation(qkv, config.activation, "conv_activation")
        q, k, v = b.split(qkv, [config.keys, config.keys, config.values], "qkv")
        out = b.recurrent_scan(
            b.l2_norm(q, key_dim, _L2_EPS, "q_norm"),
            b.l2_norm(k, key_dim, _L2_EPS, "k_norm"),
            v,
            recurrent.decay(b, recurrent.step_size(b, step, heads), heads),
            b.activation(beta, "sigmoid", "beta"),
            heads=heads,
            key_heads=config.key_heads,
            scale=key_dim**-0.5,
            delta=True,
        )
        # Unlike the others this norm stores its weight as it is.
        out = b.rms_norm(out, "norm", eps=config.norm_eps, run=config.value_dim)
        out = b.gated_activation(z, out, "silu", "gated")
        return b.linear(out, "out_proj", config.hidden_size, axes=("hidden", "heads"))


def build(config: ModelConfig) -> Program:
    return decoder(config, layer)


def locate(name: str, checkpoint: Checkpoint, config: ModelConfig) -> TensorPlace:
    assert isinstance(config, Qwen3NextConfig)
    stem, _, kind = name.rpartition(".")
    scope, _, part = stem.rpartition(".")
    fused = _FUSED.get(f"{scope.rpartition('.')[2]}.{part}")
    if fused is not None:
        tensor, rows, index = f"{scope}.{fused[0]}.{kind}", fused[1], fused[2]
        columns = (config.hidden_size,) if kind == "weight" else ()
        shape = (_stored_rows(config)[fused[0]], *columns)
        # A damaged size must not cost memory: what does not fit is refused by its shape.
        fits = checkpoint.info(tensor).shape == shape
        return TensorPlace(tensor, rows(config)[index] if fits else None, shape)
    return recurrent.locate_recurrent(name, config.channels, config.taps) or experts.hf_place(
        name, checkpoint, config
    )


def _stored_rows(config: Qwen3NextConfig) -> dict[str, int]:
    """Rows of the projections that hold several."""
    return {
        "in_proj_qkvz": config.channels + config.values,
        "in_proj_ba": 2 * config.value_heads,
        "q_proj": 2 * config.heads * config.head_dim,
    }


def _qkvz(config: Qwen3NextConfig) -> tuple[Rows, Rows]:
    """Rows of q, k, v, and of z. Stored: a key head's q and k, then v and z of its value heads."""
    key, value = config.key_dim, config.values // config.key_heads
    rows = np.arange(config.channels + config.values).reshape(config.key_heads, -1)
    q, k, v, z = np.split(rows, [key, 2 * key, 2 * key + value], axis=1)
    return np.concatenate([part.reshape(-1) for part in (q, k, v)]), z.reshape(-1)


def _halves(heads: int, features: int) -> tuple[Rows, Rows]:
    """Rows of two projections to ``features`` each that alternate head by head."""
    rows = np.arange(2 * features).reshape(heads, 2, -1)
    return rows[:, 0].reshape(-1), rows[:, 1].reshape(-1)


def _ba(config: Qwen3NextConfig) -> tuple[Rows, Rows]:
    return _halves(config.key_heads, config.value_heads)


def _q_and_gate(config: Qwen3NextConfig) -> tuple[Rows, Rows]:
    return _halves(config.heads, config.heads * config.head_dim)


_FUSED: Mapping[str, tuple[str, Callable[[Qwen3NextConfig], tuple[Rows, Rows]], int]] = {
    "linear_attn.in_proj_qkv": ("in_proj_qkvz", _qkvz, 0),
    "linear_attn.in_proj_z": ("in_proj_qkvz", _qkvz, 1),
    "linear_attn.in_proj_b": ("in_proj_ba", _ba, 0),
    "linear_attn.in_proj_a": ("in_proj_ba", _ba, 1),
    "self_attn.q_proj": ("q_proj", _q_and_gate, 0),
    "self_attn.gate_proj": ("q_proj", _q_and_gate, 1),
}
"""Projections of the program: the tensor that holds them, its rows, and which of the two."""


ARCHITECTURE = Architecture(
    name="qwen3_next",
    hf_names=("Qwen3NextForCausalLM",),
    gguf_names=(),
    models=("Qwen 3-Next 80B-A3B",),
    features=(
        "gated delta rule and gated attention",
        "experts in all or some layers, a gated shared one",
        "partial rope",
        "biases",
        "tied head",
    ),
    configure=configure,
    build=build,
    locate=locate,
    ignored=(*huggingface.IGNORED, r"mtp\..*"),
)
