"""What decoder architectures share: attention, feed-forward, and the frame around the layers.

Linears that read the same input stand next to each other, and so do a residual sum and the
norm that follows it: the fusion pass looks for neighbours.
"""

from __future__ import annotations

from collections.abc import Callable

from sartor.graph import Builder, Program, Value
from sartor.models.config import LayerConfig, ModelConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

Layer = Callable[[Builder, Value, ModelConfig, LayerConfig], Value]


def norm(b: Builder, x: Value, config: ModelConfig, name: str, run: int = 0) -> Value:
    """RMS norm of a row, or of each run of ``run`` features."""
    return b.rms_norm(x, name, eps=config.norm_eps, run=run, weight_offset=config.norm_offset)


def rotated(b: Builder, x: Value, config: ModelConfig, layer: LayerConfig, name: str) -> Value:
    """Queries or keys with their positions, where the layer has rotary ones."""
    return x if layer.rope is None else b.rope(x, layer.rope, config.head_dim, name)


def residual(b: Builder, x: Value, inner: Value, config: ModelConfig, name: str) -> Value:
    """The sum of a layer's input and what one of its parts made of it."""
    if config.residual_scale != 1:
        inner = b.scale(inner, config.residual_scale, f"{name}_scale")
    return b.add(x, inner, name)


def self_attention(
    b: Builder,
    x: Value,
    config: ModelConfig,
    layer: LayerConfig,
    *,
    qk_norm: bool = False,
    row_norm: bool = False,
    sinks: bool = False,
    output_gate: bool = False,
) -> Value:
    """Grouped-query attention with rope.

    ``qk_norm`` normalises each head before the rope, ``row_norm`` all of them together;
    ``output_gate`` multiplies what attention
    gives by the sigmoid of another projection, ``gate_proj`` (arXiv:2505.06708).
    """
    dim, bias = config.head_dim, config.qkv_bias
    q_width, kv_width = config.heads * dim, config.kv_heads * dim
    with b.scope("self_attn"):
        q = b.linear(x, "q_proj", q_width, bias=bias, axes=("heads", "hidden"))
        k = b.linear(x, "k_proj", kv_width, bias=bias, axes=("kv_heads", "hidden"))
        v = b.linear(x, "v_proj", kv_width, bias=bias, axes=("kv_heads", "hidden"))
        gate = None
        if output_gate:
            gate = b.linear(x, "gate_proj", q_width, bias=bias, axes=("heads", "hidden"))
        if qk_norm or row_norm:
            run = 0 if row_norm else dim
            q = norm(b, q, config, "q_norm", run=run)
            k = norm(b, k, config, "k_norm", run=run)
        out = b.attention(
            rotated(b, q, config, layer, "q_rope"),
            rotated(b, k, config, layer, "k_rope"),
            v,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=dim,
            scale=config.attention_scale,
            window=layer.window,
            softcap=config.attention_softcap,
            sinks=sinks,
        )
        if gate is not None:
            out = b.gated_activation(gate, out, "sigmoid", "gated")
        return b.linear(
            out, "o_proj", config.hidden_size, bias=config.output_bias, axes=("hidden", "heads")
        )


def gated_mlp(b: Builder, x: Value, config: ModelConfig, name: str = "mlp", size: int = 0) -> Value:
    """``down(activation(gate(x)) * up(x))`` (arXiv:2002.05202), ``size`` features inside."""
    bias, size = config.mlp_bias, size or config.ffn_size
    with b.scope(name):
        gate = b.linear(x, "gate_proj", size, bias=bias, axes=("ffn", "hidden"))
        up = b.linear(x, "up_proj", size, bias=bias, axes=("ffn", "hidden"))
        inner = b.gated_activation(gate, up, config.activation)
        return b.linear(inner, "down_proj", config.hidden_size, bias=bias, axes=("hidden", "ffn"))


def pre_norm_layer(
    b: Builder, x: Value, config: ModelConfig, layer: LayerConfig, *, qk_norm: bool = False
) -> Value:
    """Norm, attention, sum; norm, feed-forward, sum."""
    inner = norm(b, x, config, "input_layernorm")
    inner = self_attention(b, inner, config, layer, qk_norm=qk_norm)
    x = residual(b, x, inner, config, "attention_residual")
    inner = norm(b, x, config, "post_attention_layernorm")
    return residual(b, x, gated_mlp(b, inner, config), config, "mlp_residual")


def decoder(config: ModelConfig, layer: Layer) -> Program:
    """Embedding, the layers, the rows that give an output, last norm and head."""
    b = Builder()
    with b.scope("model"):
        x = b.embedding(
            b.token_ids,
            "embed_tokens",
            config.vocab_size,
            config.hidden_size,
            config.embedding_scale,
        )
        x = b.embedding_segments(x)
        for index, part in enumerate(config.layers):
            with b.scope(f"layers.{index}"):
                x = layer(b, x, config, part)
        x = b.gather_rows(x, b.output_rows)
        x = norm(b, x, config, "norm")
    logits = b.linear(
        x,
        "lm_head",
        config.vocab_size,
        axes=("vocab", "hidden"),
        weight=EMBEDDING if config.tied_head else None,
    )
    if config.logit_scale != 1:
        logits = b.scale(logits, config.logit_scale, "logit_scale")
    if config.final_softcap:
        logits = b.softcap(logits, config.final_softcap, "final_softcap")
    return b.finish(logits)
