"""Attention in plain torch, over paged state and within a step.

Queries of a segment meet the gathered blocks of their sequences in one batched product; masks
come from positions. Work is cut so that scores and gathered keys stay within a budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sartor.graph import Node

if TYPE_CHECKING:
    from sartor.backends.torch.step import Step

BUDGET = 1 << 24
"""Scores, or gathered keys and values, that may exist at once (64 MiB)."""


def kv_write(step: Step, node: Node) -> tuple[()]:
    state = node.attributes["state"]
    step.state.write(state, step.slots(state), step.x(node.inputs[0]), step.x(node.inputs[1]))
    return ()


def latent_write(step: Step, node: Node) -> tuple[()]:
    state = node.attributes["state"]
    together = torch.cat([step.x(node.inputs[0]), step.x(node.inputs[1])], dim=1)
    step.state.write(state, step.slots(state), together)
    return ()


def attention(step: Step, node: Node) -> Tensor:
    a = node.attributes
    q = step.x(node.inputs[0]).view(-1, a["heads"], a["head_dim"])
    sinks = step.x(node.inputs[1]) if len(node.inputs) > 1 else None
    return _paged(step, q, a["state"], a["value_dim"], a["scale"], a["window"], a["softcap"], sinks)


def latent_attention(step: Step, node: Node) -> Tensor:
    a = node.attributes
    q = step.x(node.inputs[0]).view(-1, a["heads"], a["rank"] + a["rope_dim"])
    return _paged(step, q, a["state"], a["rank"], a["scale"])


def _paged(
    step: Step,
    q: Tensor,
    state: int,
    value_dim: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """``q [T, heads, dim]`` over a state; gives ``[T, heads * value_dim]``."""
    tokens, heads, dim = q.shape
    out = q.new_empty(tokens + 1, heads * value_dim)  # the last row is for padding
    for segment in step.segments():
        blocks, first = (step.table(name, state, segment) for name in ("blocks", "first"))
        rows, positions = segment.rows, segment.positions
        length = blocks.shape[1] * step.executable.plan.block_size
        together = max(1, BUDGET // (length * max(heads, dim + value_dim)))
        for s in range(0, len(rows), together):
            part = slice(s, s + together)
            held = step.state.read(state, blocks[part])
            k = held[0]
            v = held[1] if len(held) > 1 else k[..., :value_dim]
            key_at = (first[part, None] + torch.arange(length, device=q.device))[:, None, :]
            for queries in _cuts(rows[part], length * heads):
                mine = rows[part][:, queries]
                query_at = positions[part][:, queries, None]
                visible = key_at <= query_at
                if window:
                    visible = visible & (key_at > query_at - window)
                found = attend(take_rows(q, mine), k, v, visible, scale, softcap, sinks)
                out.index_copy_(0, mine.reshape(-1), found)
    return out[:-1]


def self_attention(step: Step, node: Node) -> Tensor:
    a = node.attributes
    q = step.x(node.inputs[0]).view(-1, a["heads"], a["head_dim"])
    k = step.x(node.inputs[1]).view(-1, a["kv_heads"], a["head_dim"])
    v = step.x(node.inputs[2]).view(-1, a["kv_heads"], a["value_dim"])
    out = q.new_empty(len(q) + 1, a["heads"] * a["value_dim"])
    for segment in step.segments():
        rows, length = segment.rows, segment.shape.queries
        at = torch.arange(length, device=q.device)
        widths = a["kv_heads"] * (a["head_dim"] + a["value_dim"])
        together = max(1, BUDGET // (length * max(a["heads"], widths)))
        for s in range(0, len(rows), together):
            part = slice(s, s + together)
            keys, values = take_rows(k, rows[part]), take_rows(v, rows[part])
            there = (at < segment.lengths[part, None])[:, None, :]
            for queries in _cuts(rows[part], length * a["heads"]):
                mine = rows[part][:, queries]
                visible = there.expand(-1, mine.shape[1], -1)
                if a["window"]:
                    visible = visible & ((at - at[queries, None]).abs() < a["window"])
                found = attend(take_rows(q, mine), keys, values, visible, a["scale"])
                out.index_copy_(0, mine.reshape(-1), found)
    return out[:-1]


def _cuts(rows: Tensor, scores: int) -> list[slice]:
    """The queries of ``rows [s, n]`` in runs whose ``scores`` (for one query) fit the budget."""
    count = max(1, BUDGET // (len(rows) * scores))
    return [slice(start, start + count) for start in range(0, rows.shape[1], count)]


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """``x [T, ...]`` at ``rows [s, n]``; padding takes the last row, whose result is dropped."""
    flat = rows.reshape(-1).clamp(max=len(x) - 1)
    return x.index_select(0, flat).view(*rows.shape, *x.shape[1:])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """``q [s, n, heads, dim]`` over ``k, v [s, length, kv_heads, dim]`` where ``visible
    [s, n, length]``; gives ``[s * n, heads * value_dim]``. See :func:`sartor.ops.functions.attend`.
    """
    s, n, heads, dim = q.shape
    length, kv_heads, value_dim = v.shape[1:]
    group = heads // kv_heads
    # What nobody sees counts for nothing, even if an earlier owner left an infinity there.
    v = torch.where(visible.any(dim=1)[:, :, None, None], v, 0.0)
    q = q.view(s, n, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
    q = q.reshape(s * kv_heads, group * n, dim)
    k = k.permute(0, 2, 3, 1).reshape(s * kv_heads, dim, length)
    v = v.transpose(1, 2).reshape(s * kv_heads, length, value_dim)
    scores = torch.bmm(q, k).mul_(scale)
    if softcap:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    scores = scores.view(s, kv_heads, group, n, length)
    scores = scores.masked_fill_(~visible[:, None, None], float("-inf"))
    if sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        column = sinks.view(1, kv_heads, group, 1, 1).expand(s, -1, -1, n, -1)
        weights = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    out = torch.bmm(weights.reshape(s * kv_heads, group * n, length), v)
    out = out.view(s, kv_heads, group, n, value_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(s * n, heads * value_dim)
