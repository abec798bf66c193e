"""Linear layers in plain torch: dense and quantised, by expert, by head, with adapters.

Arithmetic is float32. A weight that is not float32 is widened where it is used, a piece at a
time, so that a model needs no second copy of itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sartor.backends.torch.weights import TorchWeight
from sartor.graph import Node
from sartor.ops.functions import ACTIVATION_GROUP, OUTLIER

if TYPE_CHECKING:
    from sartor.backends.torch.step import Step

PIECE = 1 << 24
"""Values of a weight that are widened at once (64 MiB)."""


def prepare(x: Tensor, weight: TorchWeight, int8: bool, threshold: float) -> Tensor:
    """Input columns in the order of a weight's codes, rounded as int8 activations are."""
    if weight.permutation is not None:
        x = x.index_select(1, weight.permutation)
    return round_activations(x, threshold) if int8 else x


def round_activations(x: Tensor, threshold: float) -> Tensor:
    """:func:`sartor.ops.functions.round_activations` in torch."""
    rows, columns = x.shape
    groups = -(-columns // ACTIVATION_GROUP)
    padded = F.pad(x, (0, groups * ACTIVATION_GROUP - columns))
    grouped = padded.view(rows, groups, ACTIVATION_GROUP)
    scale = grouped.abs().amax(dim=2) / 127
    square = (scale * scale).sum(dim=1, keepdim=True) / groups
    refined = (scale > threshold * square.sqrt()) & (scale > 0)
    fine = torch.where(refined, scale / 256, 0.0)
    seen = torch.round(grouped * _inverse(scale)) * scale[:, :, None]
    rest = torch.round((grouped - seen) * _inverse(fine)).clamp(-127, 127)
    return (seen + rest * fine[:, :, None]).view(rows, -1)[:, :columns]


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1 / scale, 0.0)[:, :, None]


def _threshold(step: Step, output: int) -> float:
    """The layer that makes the logits refines every group."""
    return 0.0 if output == step.executable.logits else OUTLIER


def linear(step: Step, node: Node) -> Tensor:
    weight = step.weight(node.inputs[1])
    bias = step.x(node.inputs[2]) if len(node.inputs) > 2 else None
    x = step.rounded(node.inputs[0], weight, _threshold(step, node.outputs[0]))
    out = multiply(x, weight, bias)
    return adapted(step, node, out)


def multiply(x: Tensor, weight: TorchWeight, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` for ``x [T, K]`` in the order of the codes."""
    if weight.data.dtype == torch.float32 or weight.data.numel() <= PIECE:
        values = weight.data if weight.data.dtype == torch.float32 else weight.floats()
        return F.linear(x, values, bias)
    out = x.new_empty(len(x), weight.shape[0])
    for rows, values in weight.pieces(PIECE):
        out[:, rows] = F.linear(x, values, None if bias is None else bias[rows])
    return out


def adapted(step: Step, node: Node, out: Tensor) -> Tensor:
    """Adds what low-rank adapters add to the rows of their sequences."""
    weight = step.weight(node.inputs[1])
    kind = step.executable.program.values[node.outputs[0]].shape[0]
    for adapter in step.shape.adapters:
        layer = step.executable.adapters[adapter].get(weight.name)
        if layer is not None:
            rows = step.arrays[f"adapter.{adapter}.{kind}"]
            down, up = layer
            x = step.x(node.inputs[0]).index_select(0, rows)
            out.index_add_(0, rows, x @ down.T @ up.T)
    return out


def linear_group(step: Step, node: Node) -> tuple[Tensor, ...]:
    """Linear layers of one input, each by the kernel of its own weight."""
    results: list[Tensor] = []
    for member in members(node):
        found = step.executable.kernel(member).run(step, member)
        assert isinstance(found, Tensor)
        results.append(found)
    return tuple(results)


def members(node: Node) -> list[Node]:
    """The linear nodes that a ``linear_group`` stands for."""
    rest = list(node.inputs[1:])
    found = []
    for output, has_bias in zip(node.outputs, node.attributes["biases"], strict=True):
        inputs = [node.inputs[0], rest.pop(0)] + ([rest.pop(0)] if has_bias else [])
        found.append(Node(node.name, "linear", tuple(inputs), (output,)))
    return found


def head_linear(step: Step, node: Node) -> Tensor:
    weight = step.weight(node.inputs[1])
    heads, n, k = weight.shape
    x = step.x(node.inputs[0]).view(-1, k)
    x = prepare(x, weight, _int8(step, weight), OUTLIER).view(-1, heads, k)
    out = x.new_empty(len(x), heads, n)
    for rows, values in weight.pieces(PIECE):
        part = torch.bmm(x[:, rows].transpose(0, 1), values.transpose(1, 2))
        out[:, rows] = part.transpose(0, 1)
    return out.view(-1, heads * n)


def _int8(step: Step, weight: TorchWeight) -> bool:
    return weight.rounds and step.executable.plan.activation == "int8"


def grouped_linear(step: Step, node: Node) -> Tensor:
    """Each slot through the matrix of its expert, without asking how many slots an expert has.

    Slots are sorted by expert and each expert's run is padded to whole tiles of rows, so a tile
    has one matrix: a batched product over tiles whose number is bounded by sizes that the host
    knows. A step with few slots has tiles of one row and reads only matrices that are used; a
    long prompt widens a matrix about twice at most. Nothing waits for the device, and the same
    code can be captured in a graph.
    """
    chosen = step.x(node.inputs[1])
    tokens, slots = chosen.shape
    weight = step.weight(node.inputs[2])
    experts, n, k = weight.shape
    x = step.x(node.inputs[0])
    shared = x.shape[1] == k
    x = prepare(x.reshape(-1, k), weight, _int8(step, weight), OUTLIER)
    tiles = Tiles(chosen.reshape(-1).long(), experts)
    x = torch.cat([x, x.new_zeros(1, k)])  # the row of padding
    rows = tiles.slots // slots if shared else tiles.slots
    out = x.new_empty(tokens * slots + 1, n)
    batch = max(1, PIECE // (n * k))
    for start in range(0, tiles.count, batch):
        part = slice(start, min(start + batch, tiles.count))
        values = weight.floats(tiles.expert[part])
        given = x.index_select(0, rows[part].reshape(-1)).view(-1, tiles.rows, k)
        made = torch.bmm(given, values.transpose(1, 2))
        out.index_copy_(0, tiles.slots[part].reshape(-1), made.view(-1, n))
    out = out[:-1]
    if len(node.inputs) > 3:
        out = out + step.x(node.inputs[3]).index_select(0, chosen.reshape(-1).long())
    return out.view(tokens, slots * n)


class Tiles:
    """Slots sorted by expert, in tiles of ``rows`` of one expert each.

    expert  ``[count]`` the expert of each tile; slots ``[count, rows]`` the slot of each row, or
    the number of slots for padding
    """

    def __init__(self, chosen: Tensor, experts: int) -> None:
        slots, device = len(chosen), chosen.device
        self.rows = max(1, slots // experts)
        used = min(experts, slots)
        # Whole tiles of every expert: (slots + used * (rows - 1)) / rows of them at most.
        self.count = max(1, (slots + used * (self.rows - 1)) // self.rows)
        order = torch.argsort(chosen, stable=True)
        ordered = chosen.index_select(0, order)
        sizes = torch.zeros(experts, dtype=torch.int64, device=device)
        sizes.scatter_add_(0, chosen, torch.ones_like(chosen))
        tiles = (sizes + self.rows - 1) // self.rows
        ends = tiles.cumsum(0)
        first = (ends - tiles) * self.rows - (sizes.cumsum(0) - sizes)
        place = first.index_select(0, ordered) + torch.arange(slots, device=device)
        held = torch.full((self.count * self.rows,), slots, dtype=torch.int64, device=device)
        self.slots = held.index_copy_(0, place, order).view(self.count, self.rows)
        numbers = torch.arange(self.count, device=device)
        self.expert = torch.searchsorted(ends, numbers, right=True).clamp_(max=experts - 1)
