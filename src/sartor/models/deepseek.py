"""DeepSeek V2 (arXiv:2405.04434) and V3 (arXiv:2412.19437), and what has their shape.

Latent attention in its absorbed form: the state keeps one compressed vector a token for all
heads, and the projections from it to keys and values are applied to the query and to the
result instead. Checkpoints store those two projections as one matrix ``kv_b_proj``; the part for
keys is needed transposed, so it is widened to float32 where it is quantised (its groups run along
the other axis). GGUF files of later date hold both parts apart, the first one transposed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from sartor.formats import Checkpoint
from sartor.graph import Builder, Program, Value
from sartor.models import experts, gguf, huggingface
from sartor.models.blocks import decoder, norm, residual
from sartor.models.config import ExpertsConfig, LatentConfig, LayerConfig, ModelConfig
from sartor.models.options import Options
from sartor.models.registry import Architecture, TensorPlace
from sartor.models.rope import gguf_rope, hf_rope
from sartor.ops.rope import RopeSpec
from sartor.ops.weights import DenseFormat, Weight, dense

_LATENT_EPS = 1e-6  # of the norms inside attention, whatever the configuration says
_GGUF_SCORES = {1: "softmax", 2: "sigmoid"}
_GGUF_PARTS: Mapping[str, str] = {
    **gguf.LAYER_PARTS,
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.k_b_proj": "attn_k_b",
    "self_attn.v_b_proj": "attn_v_b",
}
_LATENT = re.compile(r"(model\.layers\.(\d+)\.self_attn)\.(k|v)_b_proj\.weight")
_CHOICE = re.compile(rf"model\.layers\.(\d+)\.mlp\.gate\.{experts.BIAS}")


def configure(checkpoint: Checkpoint) -> ModelConfig:
    return _from_gguf(checkpoint) if checkpoint.kind == "gguf" else _from_hf(checkpoint)


def _from_hf(checkpoint: Checkpoint) -> ModelConfig:
    """Defaults are those of transformers' DeepseekV2Config and DeepseekV3Config."""
    options = huggingface.hf_options(checkpoint)
    third = checkpoint.architecture == "DeepseekV3ForCausalLM"
    layers = huggingface.hf_layer_count(checkpoint, options)
    heads = options.size("num_attention_heads")
    options.require("num_key_value_heads", heads)
    options.require("mlp_bias", False)
    options.require("moe_layer_freq", 1)
    latent = LatentConfig(
        query_rank=options.nullable("q_lora_rank", 1536),
        rank=options.size("kv_lora_rank", 512),
        nope_dim=options.size("qk_nope_head_dim", 128),
        rope_dim=options.even_size("qk_rope_head_dim", 64),
        value_dim=options.size("v_head_dim", 128),
    )
    rope = dataclasses.replace(
        hf_rope(options, latent.rope_dim),
        interleaved=options.flag("rope_interleave", True) if third else True,
    )
    bias = options.flag("attention_bias", False)
    head_dim = latent.nope_dim + latent.rope_dim
    magnitude = _magnitude(rope.factor, 0.1 * rope.mscale_all_dim)
    config = ModelConfig(
        architecture="deepseek",
        vocab_size=options.size("vocab_size"),
        hidden_size=options.size("hidden_size"),
        ffn_size=options.size("intermediate_size"),
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        layers=(LayerConfig(rope),) * layers,
        context_length=huggingface.hf_context(options, rope),
        norm_eps=options.positive("rms_norm_eps", 1e-6),
        activation=huggingface.hf_activation(options),
        attention_scale=magnitude**2 * head_dim**-0.5,
        tied_head=huggingface.hf_tied_head(checkpoint, options, default=False),
        qkv_bias=bias,
        output_bias=bias,
        latent=latent,
    )
    dense_layers = options.nullable("first_k_dense_replace", 3 if third else 0)
    found = _third_experts(options) if third else _second_experts(options)
    return experts.with_experts(config, found, range(min(dense_layers, layers)))


def _magnitude(factor: float, weight: float) -> float:
    """What YaRN multiplies queries and keys by (arXiv:2309.00071, section 3.4)."""
    return 1.0 + weight * math.log(max(factor, 1.0))


def _second_experts(options: Options) -> ExpertsConfig:
    """V2: softmax over all experts; a group is as good as its best expert."""
    options.require("scoring_func", "softmax")
    # The published code and transformers disagree on what it means here.
    options.require("norm_topk_prob", False)
    method = options.text("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise options.refusal("topk_method", method)
    limited = method == "group_limited_greedy"
    size = options.size("moe_intermediate_size", 1407)
    return ExpertsConfig(
        count=options.size("n_routed_experts", 64),
        used=options.size("num_experts_per_tok"),
        size=size,
        normalize=False,
        scale=options.positive("routed_scaling_factor", 1.0),
        groups=options.size("n_group") if limited else 1,
        top_groups=options.size("topk_group") if limited else 1,
        shared_size=size * options.nullable("n_shared_experts", 2),
    )


def _third_experts(options: Options) -> ExpertsConfig:
    """V3: sigmoid scores, a bias for the choice; a group is as good as its best two experts."""
    options.require("scoring_func", "sigmoid")
    options.require("topk_method", "noaux_tc")
    size = options.size("moe_intermediate_size", 2048)
    return ExpertsConfig(
        count=options.size("n_routed_experts", 256),
        used=options.size("num_experts_per_tok", 8),
        size=size,
        score="sigmoid",
        normalize=options.flag("norm_topk_prob", True),
        scale=options.positive("routed_scaling_factor", 2.5),
        groups=options.size("n_group", 8),
        top_groups=options.size("topk_group", 4),
        group_score="top2_sum",
        choice_bias=True,
        shared_size=size * options.nullable("n_shared_experts", 1),
    )


def _from_gguf(checkpoint: Checkpoint) -> ModelConfig:
    options = gguf.gguf_options(checkpoint)
    heads = options.size("attention.head_count")
    latent = _gguf_latent(options, heads)
    rope, magnitude = _gguf_rope(options, latent.rope_dim)
    head_dim = latent.nope_dim + latent.rope_dim
    config = dataclasses.replace(
        gguf.gguf_config(checkpoint, options, "deepseek", head=(head_dim, rope)),
        kv_heads=heads,
        attention_scale=magnitude**2 * head_dim**-0.5,
        latent=latent,
    )
    dense_layers = options.nullable("leading_dense_block_count", 0)
    found = _gguf_experts(checkpoint, options)
    gguf.refuse_unread(options)
    return experts.with_experts(config, found, range(min(dense_layers, len(config.layers))))


def _gguf_latent(options: Options, heads: int) -> LatentConfig:
    """Later files describe attention in the absorbed form, over one head of latent keys."""
    rank = options.size("attention.kv_lora_rank")
    rope_dim = options.even_size("rope.dimension_count")
    absorbed = options.raw("attention.key_length_mla") is not None
    suffix = "_mla" if absorbed else ""
    key_dim = options.size(f"attention.key_length{suffix}")
    value_dim = options.size(f"attention.value_length{suffix}")
    options.require("attention.head_count_kv", 1 if absorbed else heads)
    if absorbed:
        options.require("attention.key_length", rank + rope_dim)
        options.require("attention.value_length", rank)
    if key_dim <= rope_dim:
        raise options.refusal(f"attention.key_length{suffix}", key_dim)
    query_rank = options.nullable("attention.q_lora_rank", 0)
    return LatentConfig(query_rank, rank, key_dim - rope_dim, rope_dim, value_dim)


def _gguf_rope(options: Options, dim: int) -> tuple[RopeSpec, float]:
    """The rope, and what queries and keys are multiplied by.

    ``rope.scaling.yarn_log_multiplier`` is a tenth of ``mscale_all_dim``; files cannot say that
    ``mscale`` differs from it, so the rotation itself keeps lengths (llama.cpp).
    """
    log_multiplier = options.number("rope.scaling.yarn_log_multiplier", 0.0)
    rope = gguf_rope(options, dim, options.size("context_length"))
    if rope.kind == "linear":
        raise options.refusal("rope.scaling.type", "linear")
    if rope.kind != "yarn":
        return dataclasses.replace(rope, interleaved=True), 1.0
    options.require("rope.scaling.attn_factor", 1.0)
    options.positive("rope.scaling.yarn_log_multiplier")
    rope = dataclasses.replace(rope, interleaved=True, attention_factor=1.0)
    return rope, _magnitude(rope.factor, log_multiplier)


def _gguf_experts(checkpoint: Checkpoint, options: Options) -> ExpertsConfig:
    size = options.size("expert_feed_forward_length")
    biased = any(name.endswith(".exp_probs_b.bias") for name in checkpoint.names())
    # The first files, of V2, do not state the score.
    kind = options.integer("expert_gating_func", None if biased else 1)
    if kind not in _GGUF_SCORES:
        raise options.refusal("expert_gating_func", kind)
    score = _GGUF_SCORES[kind]
    groups = options.nullable("expert_group_count", 0) or 1
    top_groups = options.nullable("expert_group_used_count", 0) or 1
    return ExpertsConfig(
        count=options.size("expert_count"),
        used=options.size("expert_used_count"),
        size=size,
        score=score,
        normalize=options.flag("expert_weights_norm", False),
        scale=options.number("expert_weights_scale", 0.0) or 1.0,
        groups=groups,
        top_groups=top_groups if groups > 1 else 1,
        group_score="max" if score == "softmax" else "top2_sum",
        choice_bias=biased,
        shared_size=size * options.nullable("expert_shared_count", 0),
    )


def latent_attention(b: Builder, x: Value, config: ModelConfig, layer: LayerConfig) -> Value:
    """Queries are taken to the latent space, and results back from it, by a matrix a head."""
    latent, heads = config.latent, config.heads
    assert latent is not None
    assert layer.rope is not None
    width = heads * (latent.nope_dim + latent.rope_dim)
    bias = config.qkv_bias
    with b.scope("self_attn"):
        if latent.query_rank:
            q = b.linear(x, "q_a_proj", latent.query_rank, bias=bias, axes=("", "hidden"))
            q = b.rms_norm(q, "q_a_layernorm", eps=_LATENT_EPS)
            q = b.linear(q, "q_b_proj", width, axes=("heads", ""))
        else:
            q = b.linear(x, "q_proj", width, axes=("heads", "hidden"))
        together = b.linear(
            x,
            "kv_a_proj_with_mqa",
            latent.rank + latent.rope_dim,
            bias=bias,
            axes=("", "hidden"),
        )
        kv, k_rope = b.split(together, [latent.rank, latent.rope_dim], "kv_split")
        kv = b.rms_norm(kv, "kv_a_layernorm", eps=_LATENT_EPS)
        q, q_rope = b.split(q, [latent.nope_dim, latent.rope_dim], "q_split", runs=heads)
        q = b.head_linear(q, "k_b_proj", heads, latent.rank)
        q_rope = b.rope(q_rope, layer.rope, latent.rope_dim, "q_rope")
        k_rope = b.rope(k_rope, layer.rope, latent.rope_dim, "k_rope")
        q = b.concat([q, q_rope], "q_concat", runs=heads)
        out = b.latent_attention(q, kv, k_rope, heads=heads, scale=config.attention_scale)
        out = b.head_linear(out, "v_b_proj", heads, latent.value_dim)
        return b.linear(
            out, "o_proj", config.hidden_size, bias=config.output_bias, axes=("hidden", "heads")
        )


def layer(b: Builder, x: Value, config: ModelConfig, part: LayerConfig) -> Value:
    inner = norm(b, x, config, "input_layernorm")
    x = residual(b, x, latent_attention(b, inner, config, part), config, "attention_residual")
    inner = norm(b, x, config, "post_attention_layernorm")
    return residual(b, x, experts.feed_forward(b, inner, config, part), config, "mlp_residual")


def build(config: ModelConfig) -> Program:
    return decoder(config, layer)


def locate(name: str, checkpoint: Checkpoint, config: ModelConfig) -> TensorPlace:
    in_gguf = checkpoint.kind == "gguf"
    match = _LATENT.fullmatch(name)
    if match is not None:
        prefix, index, part = match.groups()
        whole = f"blk.{index}.attn_kv_b.weight" if in_gguf else f"{prefix}.kv_b_proj.weight"
        if not in_gguf or gguf.gguf_name(name, _GGUF_PARTS) not in checkpoint.names():
            return _part_of_kv(whole, part, config)
    match = _CHOICE.fullmatch(name)
    if in_gguf and match is not None:
        return TensorPlace(f"blk.{match[1]}.exp_probs_b.bias")
    if in_gguf:
        return TensorPlace(gguf.gguf_name(name, _GGUF_PARTS))
    return experts.hf_place(name, checkpoint, config)


def _part_of_kv(tensor: str, part: str, config: ModelConfig) -> TensorPlace:
    """A head of the matrix has ``nope_dim`` rows for keys, then ``value_dim`` for values."""
    latent, heads = config.latent, config.heads
    assert latent is not None
    rows = latent.nope_dim + latent.value_dim

    def values(weight: Weight) -> Weight:
        per_head = weight.reshape(heads, rows)
        return experts.second_axis(per_head, slice(latent.nope_dim, None))

    def keys(weight: Weight) -> Weight:
        if not isinstance(weight.format, DenseFormat):
            weight = dense(weight.name, weight.dequantize())
        per_head = experts.second_axis(weight.reshape(heads, rows), slice(latent.nope_dim))
        return dataclasses.replace(per_head, data=np.swapaxes(per_head.data, 1, 2))

    shape = (heads * rows, latent.rank)
    return TensorPlace(tensor, shape=shape, convert=keys if part == "k" else values)


ARCHITECTURE = Architecture(
    name="deepseek",
    hf_names=("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
    gguf_names=("deepseek2",),
    models=("DeepSeek V2, V2.5, V3, R1",),
    features=(
        "latent attention (absorbed)",
        "dense first layers",
        "group-limited experts",
        "shared experts",
    ),
    configure=configure,
    build=build,
    locate=locate,
    ignored=(
        *huggingface.IGNORED,
        *gguf.IGNORED,
        r"model\.layers\.61\..*",  # V3's head for several tokens at once
        r"blk\.\d+\.attn_kv_b\.weight",  # a copy, where its two parts are there
    ),
)
