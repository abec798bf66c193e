"""The table of plain operators: one handler each, for any device that torch drives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sartor.backends.torch import attention, linear, recurrent
from sartor.backends.torch.kernels import Handler, Results
from sartor.backends.torch.sampling import sample
from sartor.graph import Node
from sartor.ops.functions import GATE_ALPHA, GATE_LIMIT

if TYPE_CHECKING:
    from sartor.backends.torch.step import Step

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "exp": torch.exp,
    "tanh": torch.tanh,
}


def embedding(step: Step, node: Node) -> Tensor:
    table = step.weight(node.inputs[1])
    rows = table.floats(step.x(node.inputs[0]))
    if table.inverse is not None:
        rows = rows.index_select(1, table.inverse)
    return rows.mul_(node.attributes["scale"])


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, weight_offset: float) -> Tensor:
    run = len(weight)
    if weight_offset:
        weight = weight + weight_offset
    return F.rms_norm(x.view(-1, run), (run,), weight, eps).view(x.shape)


def add_rms_norm(
    x: Tensor, y: Tensor, weight: Tensor, *, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    total = x + y
    return total, rms_norm(total, weight, eps=eps, weight_offset=weight_offset)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[1],), weight, bias, eps)


def l2_norm(x: Tensor, *, run: int, eps: float) -> Tensor:
    grouped = x.view(-1, run)
    total = (grouped * grouped).sum(dim=1, keepdim=True)
    return (grouped / (total + eps).sqrt()).view(x.shape)


def rope(step: Step, node: Node) -> Tensor:
    spec = step.executable.program.ropes[node.attributes["rope"]]
    cos, sin = step.rotations(node.attributes["rope"])
    x = step.x(node.inputs[0])
    heads = x.view(len(x), -1, node.attributes["head_dim"])
    half, dim = spec.dim // 2, spec.dim
    first = slice(0, dim, 2) if spec.interleaved else slice(0, half)
    second = slice(1, dim, 2) if spec.interleaved else slice(half, dim)
    a, b = heads[..., first], heads[..., second]
    out = heads.clone()
    out[..., first] = a * cos - b * sin
    out[..., second] = b * cos + a * sin
    return out.view(x.shape)


def activation(x: Tensor, *, kind: str) -> Tensor:
    return ACTIVATIONS[kind](x)


def gated_activation(gate: Tensor, up: Tensor, *, kind: str) -> Tensor:
    if kind != "clamped_silu":
        return ACTIVATIONS[kind](gate) * up
    gate, up = gate.clamp(max=GATE_LIMIT), up.clamp(-GATE_LIMIT, GATE_LIMIT)
    return gate * torch.sigmoid(GATE_ALPHA * gate) * (up + 1)


def split(x: Tensor, *, widths: list[int], runs: int) -> tuple[Tensor, ...]:
    parts = torch.split(x.view(len(x), runs, -1), list(widths), dim=2)
    return tuple(part.reshape(len(x), -1).contiguous() for part in parts)


def concat(*parts: Tensor, runs: int) -> Tensor:
    rows = len(parts[0])
    return torch.cat([part.view(rows, runs, -1) for part in parts], dim=2).view(rows, -1)


def replace_rows(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    return x.index_copy(0, rows, values) if len(rows) else x


def pool(step: Step, node: Node) -> Tensor:
    x, starts = step.x(node.inputs[0]), step.arrays["starts"]
    match node.attributes["kind"]:
        case "cls":
            return x.index_select(0, starts[:-1])
        case "last":
            return x.index_select(0, starts[1:] - 1)
    out = x.new_empty(step.shape.sequences, x.shape[1])
    for segment in step.segments():
        there = torch.arange(segment.shape.queries, device=x.device) < segment.lengths[:, None]
        rows = torch.where(there[:, :, None], attention.take_rows(x, segment.rows), 0.0)
        out.index_copy_(0, segment.members, rows.sum(dim=1) / segment.lengths[:, None])
    return out


def route_experts(
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int,
    score: str,
    normalize: bool,
    scale: float,
    groups: int,
    top_groups: int,
    group_score: str,
) -> tuple[Tensor, Tensor]:
    """See :func:`sartor.ops.experts.route_experts`. Sorting is stable: ties go to the lower
    number."""
    scores = logits.softmax(dim=1) if score == "softmax" else logits.sigmoid()
    choice = scores if bias is None else scores + bias
    if groups > 1:
        grouped = choice.view(len(logits), groups, -1)
        if group_score == "max":
            merit = grouped.amax(dim=2)
        else:
            merit = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(dim=2)
        best = merit.argsort(dim=1, descending=True, stable=True)[:, :top_groups]
        eligible = torch.zeros_like(merit, dtype=torch.bool).scatter_(1, best, True)
        choice = grouped.masked_fill(~eligible[:, :, None], float("-inf")).view(choice.shape)
    experts = choice.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    weights = scores.gather(1, experts)
    if normalize:
        weights = weights / weights.sum(dim=1, keepdim=True)
    return experts, weights * scale


def combine_experts(x: Tensor, weights: Tensor) -> Tensor:
    tokens, slots = weights.shape
    return (x.view(tokens, slots, -1) * weights[:, :, None]).sum(dim=1)


def _plain(function: Callable[..., Results]) -> Handler:
    """A handler from a function of tensors and attributes."""

    def run(step: Step, node: Node) -> Results:
        return function(*(step.x(value) for value in node.inputs), **node.attributes)

    return run


_TENSORS: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "layer_norm": layer_norm,
    "l2_norm": l2_norm,
    "activation": activation,
    "gated_activation": gated_activation,
    "add": torch.add,
    "mul": torch.mul,
    "scale": lambda x, *, factor: x * factor,
    "softcap": lambda x, *, cap: (x / cap).tanh_().mul_(cap),
    "split": split,
    "concat": concat,
    "replace_rows": replace_rows,
    "gather_rows": lambda x, rows: x.index_select(0, rows),
    "route_experts": route_experts,
    "combine_experts": combine_experts,
}
PLAIN: Mapping[str, Handler] = {
    "embedding": embedding,
    "linear": linear.linear,
    "linear_group": linear.linear_group,
    "grouped_linear": linear.grouped_linear,
    "head_linear": linear.head_linear,
    "rope": rope,
    "kv_write": attention.kv_write,
    "attention": attention.attention,
    "self_attention": attention.self_attention,
    "latent_write": attention.latent_write,
    "latent_attention": attention.latent_attention,
    "short_conv": recurrent.short_conv,
    "recurrent_scan": recurrent.recurrent_scan,
    "pool": pool,
    "sample": sample,
    **{name: _plain(function) for name, function in _TENSORS.items()},
}
"""The implementation of every operator where no kernel is registered for it."""
