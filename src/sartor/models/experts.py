"""What architectures with experts share: the sparse feed-forward part, and where experts lie.

Sparsely gated experts: arXiv:1701.06538; an expert that sees every token: arXiv:2401.06066.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from sartor.errors import FormatError
from sartor.formats import Checkpoint
from sartor.graph import Builder, Program, Value
from sartor.models.blocks import decoder, gated_mlp, norm, residual, self_attention
from sartor.models.config import ExpertsConfig, LayerConfig, ModelConfig
from sartor.models.registry import TensorPlace
from sartor.ops.weights import Weight

BIAS = "e_score_correction_bias"
"""What Hugging Face checkpoints call the bias that counts for the choice only."""

_EXPERTS = re.compile(r"(.+\.mlp\.experts)\.(gate|up|down)_proj\.weight")


def feed_forward(
    b: Builder, x: Value, config: ModelConfig, layer: LayerConfig, *, shared_gate: bool = False
) -> Value:
    """The experts of a sparse layer, else the gated feed-forward part.

    ``shared_gate`` multiplies what the shared expert gives by the sigmoid of a projection to one
    number (Qwen, which has one such expert and names it in the singular).
    """
    if not layer.sparse:
        return gated_mlp(b, x, config)
    experts = config.experts
    assert experts is not None
    with b.scope("mlp"):
        logits = b.linear(
            x, "gate", experts.count, bias=experts.router_bias, axes=("experts", "hidden")
        )
        chosen, weights = b.route_experts(
            logits,
            top_k=experts.used,
            score=experts.score,
            normalize=experts.normalize,
            scale=experts.scale,
            groups=experts.groups,
            top_groups=experts.top_groups,
            group_score=experts.group_score,
            bias=f"gate.{BIAS}" if experts.choice_bias else "",
        )
        out = b.combine_experts(_gated_experts(b, x, chosen, config, experts), weights)
        if experts.shared_size:
            name = "shared_expert" if shared_gate else "shared_experts"
            shared = gated_mlp(b, x, config, name, experts.shared_size)
            if shared_gate:
                gate = b.linear(x, "shared_expert_gate", 1, axes=("", "hidden"))
                gate = b.activation(gate, "sigmoid", "shared_gate")
                shared = b.combine_experts(shared, gate, "shared_gated")
            out = b.add(out, shared, "shared_sum")
        return out


def _gated_experts(
    b: Builder, x: Value, chosen: Value, config: ModelConfig, experts: ExpertsConfig
) -> Value:
    """A gated feed-forward part an expert: ``[T, used * hidden]``."""
    hidden, size = config.hidden_size, experts.size
    inwards, outwards = ("ffn", "hidden"), ("hidden", "ffn")

    def linear(source: Value, name: str, inputs: int, width: int, axes: tuple[str, str]) -> Value:
        return b.grouped_linear(
            source, chosen, name, experts.count, inputs, width, bias=experts.bias, axes=axes
        )

    with b.scope("experts"):
        gate = linear(x, "gate_proj", hidden, size, inwards)
        up = linear(x, "up_proj", hidden, size, inwards)
        inner = b.gated_activation(gate, up, config.activation)
        return linear(inner, "down_proj", size, hidden, outwards)


def sparse_decoder(
    config: ModelConfig,
    *,
    qk_norm: bool = False,
    row_norm: bool = False,
    sinks: bool = False,
    shared_gate: bool = False,
) -> Program:
    """A Llama-like decoder, some or all of whose layers have experts.

    The first three options are those of :func:`self_attention`, the last that of
    :func:`feed_forward`.
    """

    def layer(b: Builder, x: Value, config: ModelConfig, part: LayerConfig) -> Value:
        inner = norm(b, x, config, "input_layernorm")
        inner = self_attention(
            b, inner, config, part, qk_norm=qk_norm, row_norm=row_norm, sinks=sinks
        )
        x = residual(b, x, inner, config, "attention_residual")
        inner = norm(b, x, config, "post_attention_layernorm")
        inner = feed_forward(b, inner, config, part, shared_gate=shared_gate)
        return residual(b, x, inner, config, "mlp_residual")

    return decoder(config, layer)


def with_experts(
    config: ModelConfig, experts: ExpertsConfig, dense: Iterable[int] = ()
) -> ModelConfig:
    """The configuration with sparse layers, but for the ``dense`` ones."""
    dense = frozenset(dense)
    layers = tuple(
        dataclasses.replace(part, sparse=index not in dense)
        for index, part in enumerate(config.layers)
    )
    return dataclasses.replace(config, experts=experts, layers=layers)


def hf_place(name: str, checkpoint: Checkpoint, config: ModelConfig) -> TensorPlace:
    """A weight of a Hugging Face checkpoint, whose experts lie apart or fused.

    Apart: a matrix an expert (``experts.0.gate_proj.weight``). Fused: ``experts.gate_up_proj``
    ``[experts, 2 * size, hidden]``, gates first, and ``experts.down_proj``.
    """
    match = _EXPERTS.fullmatch(name)
    if match is None:
        return TensorPlace(name)
    prefix, part = match.groups()
    names = set(checkpoint.names())
    if f"{prefix}.gate_up_proj" not in names:
        return apart(f"{prefix}.{{}}.{part}_proj.weight", checkpoint, config)
    if part == "down":
        return TensorPlace(f"{prefix}.down_proj")
    experts = config.experts
    assert experts is not None
    size = experts.size
    rows = slice(size) if part == "gate" else slice(size, None)
    return TensorPlace(
        f"{prefix}.gate_up_proj",
        shape=(experts.count, 2 * size, config.hidden_size),
        convert=lambda weight: second_axis(weight, rows),
    )


def apart(pattern: str, checkpoint: Checkpoint, config: ModelConfig) -> TensorPlace:
    """Experts that lie apart: ``{}`` in the pattern stands for their number."""
    assert config.experts is not None
    count, stored = config.experts.count, len(checkpoint.names())
    if count > stored:  # a damaged number must not cost memory
        raise FormatError(
            f"{checkpoint.path}: the configuration has {count} experts, but the checkpoint has "
            f"only {stored} tensors"
        )
    return TensorPlace(tuple(pattern.format(expert) for expert in range(count)))


def second_axis(weight: Weight, index: slice) -> Weight:
    """Entries of the second axis: rows of each expert's matrix; lossless."""
    return dataclasses.replace(
        weight,
        data=weight.data[:, index],
        scale=None if weight.scale is None else weight.scale[:, index],
        offset=None if weight.offset is None else weight.offset[:, index],
    )
