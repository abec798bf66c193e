"""Short convolution and linear recurrence in plain torch: step by step, sequences side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sartor.backends.torch.attention import take_rows
from sartor.graph import Node

if TYPE_CHECKING:
    from sartor.backends.torch.step import Step


def short_conv(step: Step, node: Node) -> Tensor:
    x, weight = step.x(node.inputs[0]), step.x(node.inputs[1])
    state, taps = node.attributes["state"], weight.shape[1]
    out = x.new_empty(len(x) + 1, x.shape[1])
    for segment in step.segments():
        n = segment.shape.queries
        held = segment.contexts > 0
        before = step.state.load(state, step.table("read", state, segment), held)
        history = torch.cat([before, take_rows(x, segment.rows)], dim=1)
        made = history[:, :n] * weight[:, 0]
        for tap in range(1, taps):
            made = made + history[:, tap : tap + n] * weight[:, tap]
        out.index_copy_(0, segment.rows.view(-1), made.view(-1, x.shape[1]))
        # The last inputs of each sequence, which ends before the segment does.
        kept = segment.lengths[:, None] + torch.arange(taps - 1, device=x.device)
        after = history.gather(1, kept[:, :, None].expand(-1, -1, x.shape[1]))
        step.state.store(state, step.table("write", state, segment), after)
    out = out[:-1]
    return out + step.x(node.inputs[2]) if len(node.inputs) > 2 else out


def recurrent_scan(step: Step, node: Node) -> Tensor:
    """See :func:`sartor.ops.recurrent.recurrent_scan`."""
    a = node.attributes
    heads, state = a["heads"], a["state"]
    q, k, v, decay, beta = (step.x(value) for value in node.inputs)
    q, k = (part.view(-1, a["key_heads"], a["key_dim"]) for part in (q, k))
    v = v.view(-1, heads, a["value_dim"])
    group = heads // a["key_heads"]
    out = v.new_empty(len(v) + 1, heads, a["value_dim"])
    for segment in step.segments():
        held = segment.contexts > 0
        memory = step.state.load(state, step.table("read", state, segment), held)
        parts = [take_rows(part, segment.rows) for part in (q, k, v, decay, beta)]
        for t in range(segment.shape.queries):
            q_t, k_t, v_t, decay_t, beta_t = (part[:, t] for part in parts)
            q_t, k_t = (part.repeat_interleave(group, dim=1) for part in (q_t, k_t))
            after = memory * decay_t[:, :, None, None]
            if a["delta"]:
                v_t = v_t - (k_t[:, :, None, :] @ after)[:, :, 0]
            after = after + k_t[:, :, :, None] * (beta_t[:, :, None] * v_t)[:, :, None, :]
            made = (q_t[:, :, None, :] @ after)[:, :, 0] * a["scale"]
            out.index_copy_(0, segment.rows[:, t], made)
            # A sequence that has ended keeps its state; its row went to the padding.
            memory = torch.where((t < segment.lengths)[:, None, None, None], after, memory)
        step.state.store(state, step.table("write", state, segment), memory)
    return out[:-1].reshape(len(v), -1)
