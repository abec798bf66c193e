"""Granite 4 hybrids: Mamba-2 (arXiv:2405.21060) in most layers and attention in the others, a
feed-forward part that every token sees and, in the larger sizes, experts beside it.

Embedding, attention scores, sums and logits have a factor each (arXiv:2203.03466: what was tuned
on a small model then holds for a large one).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from sartor.errors import UnsupportedError
from sartor.formats import Checkpoint
from sartor.graph import Builder, Program, Value
from sartor.models import experts, huggingface, recurrent
from sartor.models.blocks import decoder, gated_mlp, norm, residual, self_attention
from sartor.models.config import ExpertsConfig, LayerConfig, ModelConfig
from sartor.models.fused import Layout, locate_part
from sartor.models.options import Options
from sartor.models.recurrent import HybridLayer
from sartor.models.registry import Architecture, TensorPlace
from sartor.ops.weights import Weight, dense

_INFINITE = (math.inf, "Infinity", {"__float__": "Infinity"})
"""How configurations spell that a step has no upper limit."""


@dataclass(frozen=True, kw_only=True)
class GraniteHybridConfig(ModelConfig):
    """Sizes of the recurrent layers (``groups`` of heads share B and C), and ``shared_size``, the
    features inside the feed-forward part that every token sees."""

    mamba_heads: int
    mamba_dim: int
    groups: int
    state_dim: int
    taps: int
    conv_bias: bool
    projection_bias: bool
    shared_size: int

    @property
    def inner(self) -> int:
        return self.mamba_heads * self.mamba_dim

    @property
    def channels(self) -> int:
        """Features that the convolution runs over: x, B, C."""
        return self.inner + 2 * self.groups * self.state_dim


def configure(checkpoint: Checkpoint) -> ModelConfig:
    """Defaults are those of transformers' GraniteMoeHybridConfig."""
    options = huggingface.hf_options(checkpoint)
    options.require("normalization_function", "rmsnorm")
    options.require("position_embedding_type", "rope", "nope")
    _refuse_time_limit(options)
    bias = options.flag("attention_bias", False)
    config = huggingface.hf_config(checkpoint, "granite_hybrid", qkv_bias=bias, output_bias=bias)
    rope = config.layers[0].rope
    if options.raw("position_embedding_type") != "rope":
        rope = None
    count = len(config.layers)
    keys = ("layer_types", "layers_block_type")
    kinds = recurrent.recurrent_layers(options, keys, count) or (True,) * count
    config = dataclasses.replace(
        config,
        layers=tuple(HybridLayer(rope, recurrent=kind) for kind in kinds),
        attention_scale=options.positive("attention_multiplier", 1.0),
        embedding_scale=options.positive("embedding_multiplier", 1.0),
        residual_scale=options.positive("residual_multiplier", 1.0),
        logit_scale=1 / options.positive("logits_scaling", 1.0),
    )
    heads, groups = options.size("mamba_n_heads", 128), options.size("mamba_n_groups", 1)
    inner = options.size("mamba_expand", 2) * config.hidden_size
    dim = inner // heads
    if options.raw("mamba_d_head") != "auto":
        dim = options.size("mamba_d_head", dim)
    if heads * dim != inner or heads % groups:
        raise UnsupportedError(
            f"{options.where}: mamba_n_heads = {heads} of mamba_d_head = {dim} in "
            f"mamba_n_groups = {groups} do not make up {inner} features"
        )
    taps = options.size("mamba_d_conv", 4)
    if taps < 2:
        raise options.refusal("mamba_d_conv", taps)
    found = GraniteHybridConfig(
        **vars(config),
        mamba_heads=heads,
        mamba_dim=dim,
        groups=groups,
        state_dim=options.size("mamba_d_state", 256),
        taps=taps,
        conv_bias=options.flag("mamba_conv_bias", True),
        projection_bias=options.flag("mamba_proj_bias", False),
        shared_size=options.size("shared_intermediate_size", 1024),
    )
    if options.integer("num_local_experts", 8) == 0:
        return found
    chosen = ExpertsConfig(
        count=options.size("num_local_experts", 8),
        used=options.size("num_experts_per_tok", 2),
        size=config.ffn_size,
    )
    return experts.with_experts(found, chosen)


def _refuse_time_limit(options: Options) -> None:
    """A limit of the steps; published models have none."""
    limit = options.raw("time_step_limit")
    if limit is None:
        return
    if isinstance(limit, list | tuple) and len(limit) == 2:
        low, high = limit
        if low == 0 and high in _INFINITE:
            return
    raise options.refusal("time_step_limit", limit)


def layer(b: Builder, x: Value, config: ModelConfig, part: LayerConfig) -> Value:
    assert isinstance(config, GraniteHybridConfig)
    assert isinstance(part, HybridLayer)
    inner = norm(b, x, config, "input_layernorm")
    inner = mamba(b, inner, config) if part.recurrent else self_attention(b, inner, config, part)
    x = residual(b, x, inner, config, "attention_residual")
    inner = norm(b, x, config, "post_attention_layernorm")
    shared = gated_mlp(b, inner, config, "shared_mlp", config.shared_size)
    if part.sparse:
        shared = b.add(experts.feed_forward(b, inner, config, part), shared, "mlp.shared_sum")
    return residual(b, x, shared, config, "mlp_residual")


def mamba(b: Builder, x: Value, config: GraniteHybridConfig) -> Value:
    """Mamba-2: convolution over x, B, C; the recurrence; a gated norm of each group."""
    heads, inner, keys = config.mamba_heads, config.inner, config.groups * config.state_dim
    bias, group = config.projection_bias, config.inner // config.groups
    with b.scope("mamba"):
        gate = b.linear(x, "in_proj_gate", inner, bias=bias, axes=("heads", "hidden"))
        xbc = b.linear(x, "in_proj_xbc", config.channels, bias=bias, axes=("heads", "hidden"))
        step = b.linear(x, "in_proj_dt", heads, bias=bias, axes=("heads", "hidden"))
        xbc = b.short_conv(xbc, "conv1d", config.taps, bias=config.conv_bias)
        xbc = b.activation(xbc, config.activation, "conv_activation")
        x, key, query = b.split(xbc, [inner, keys, keys], "xbc")
        step = recurrent.step_size(b, step, heads)
        out = b.recurrent_scan(
            query,
            key,
            x,
            recurrent.decay(b, step, heads),
            step,
            heads=heads,
            key_heads=config.groups,
            scale=1.0,
            delta=False,
        )
        skipped = b.mul(x, b.vector("D", inner, "heads"), "skip")
        out = b.gated_activation(gate, b.add(out, skipped, "skip_sum"), "silu", "gated")
        # A norm of each group by itself, and one weight for all of the row.
        out = b.l2_norm(out, group, group * config.norm_eps, "group_norm")
        out = b.mul(out, b.vector("norm.weight", inner, "heads"), "norm")
        return b.linear(out, "out_proj", config.hidden_size, bias=bias, axes=("hidden", "heads"))


def build(config: ModelConfig) -> Program:
    return decoder(config, layer)


def locate(name: str, checkpoint: Checkpoint, config: ModelConfig) -> TensorPlace:
    assert isinstance(config, GraniteHybridConfig)
    place = (
        recurrent.locate_recurrent(name, config.channels, config.taps)
        or locate_part(name, _layout(config), config.hidden_size)
        or _locate_experts(name, config)
    )
    if place is not None:
        return place
    if name.endswith(".mamba.D"):
        return TensorPlace(
            name,
            shape=(config.mamba_heads,),
            convert=lambda weight: _each(weight, config.mamba_dim),
        )
    if name.endswith(".mamba.norm.weight"):
        # The norm divides by the length of a group's features, not by their root mean square.
        factor = math.sqrt(config.inner // config.groups)
        return TensorPlace(
            name,
            convert=lambda weight: dense(weight.name, weight.dequantize() * np.float32(factor)),
        )
    return TensorPlace(name.replace(".shared_mlp.down_proj.", ".shared_mlp.output_linear."))


def _layout(config: GraniteHybridConfig) -> Layout:
    return {
        "mamba.in_proj": (
            ("mamba.in_proj_gate", config.inner),
            ("mamba.in_proj_xbc", config.channels),
            ("mamba.in_proj_dt", config.mamba_heads),
        ),
        "shared_mlp.input_linear": (
            ("shared_mlp.gate_proj", config.shared_size),
            ("shared_mlp.up_proj", config.shared_size),
        ),
    }


def _locate_experts(name: str, config: GraniteHybridConfig) -> TensorPlace | None:
    layer_name, scope, part = name.partition(".mlp.")
    if not scope or config.experts is None:
        return None
    prefix, size = f"{layer_name}.block_sparse_moe", config.experts.size
    if part == "gate.weight":
        return TensorPlace(f"{prefix}.router.layer.weight")
    if part == "experts.down_proj.weight":
        return TensorPlace(f"{prefix}.output_linear.weight")
    rows = slice(size) if part == "experts.gate_proj.weight" else slice(size, None)
    return TensorPlace(
        f"{prefix}.input_linear.weight",
        shape=(config.experts.count, 2 * size, config.hidden_size),
        convert=lambda weight: experts.second_axis(weight, rows),
    )


def _each(weight: Weight, times: int) -> Weight:
    """A number a head, for each of the head's features."""
    return dense(weight.name, np.repeat(weight.dequantize(), times))


ARCHITECTURE = Architecture(
    name="granite_hybrid",
    hf_names=("GraniteMoeHybridForCausalLM",),
    gguf_names=(),
    models=("Granite 4.0 (micro, H-micro, H-tiny, H-small)",),
    features=(
        "Mamba-2 and attention",
        "with and without rope",
        "experts beside a shared part",
        "biases",
        "tied head",
    ),
    configure=configure,
    build=build,
    locate=locate,
    ignored=huggingface.IGNORED,
)
