"""How many state blocks each group gets."""

from __future__ import annotations

from collections.abc import Sequence

from sartor.errors import CapacityError
from sartor.plan import ExecutionPlan

MEMORY_SHARE = 0.25
"""Share of the free memory that state may take where the plan does not say."""


def size_state(
    windows: Sequence[int],
    block_bytes: Sequence[int],
    plan: ExecutionPlan,
    context_length: int,
    free_bytes: int,
) -> tuple[int, ...]:
    """Blocks of each state group, given its window (0 for none) and the bytes of a block.

    The budget is ``plan.state_bytes``, else a share of ``free_bytes``. No group gets more than
    ``plan.max_sequences`` full contexts need, nor a window group more than its windows and
    chunks need. A short sequence needs equally many blocks of every group, so below these
    bounds all groups get equally many. CapacityError when that is too little to run at all.
    """
    size = plan.block_size
    budget = plan.state_bytes or int(free_bytes * MEMORY_SHARE)
    whole = -(-context_length // size)
    chunk = -(-plan.max_batch_tokens // size)
    bounds = [
        plan.max_sequences * min(whole, -(-window // size) + chunk + 2 if window else whole)
        for window in windows
    ]
    counts = [0] * len(windows)
    left = list(range(len(windows)))
    while left:
        share = budget // sum(block_bytes[g] for g in left)
        # The tightest bound first: what it leaves over is for the others.
        group = min(left, key=bounds.__getitem__)
        if bounds[group] > share:
            for g in left:
                counts[g] = share
            break
        counts[group] = bounds[group]
        budget -= bounds[group] * block_bytes[group]
        left.remove(group)
    for window, count in zip(windows, counts, strict=True):
        least = min(whole, -(-window // size) + 2)
        if count < least:
            source = "plan: state_bytes" if plan.state_bytes else "a quarter of the free memory"
            raise CapacityError(
                f"{source} holds {count} state blocks of {size} tokens, but at least {least} are "
                f"needed; a state_bytes of {least * sum(block_bytes)} or more will do"
            )
    return tuple(counts)
