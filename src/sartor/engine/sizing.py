"""How many state blocks each group gets."""

from __future__ import annotations

from collections.abc import Sequence

from sartor.errors import CapacityError
from sartor.graph import StateGroup
from sartor.plan import ExecutionPlan

MEMORY_SHARE = 0.25
"""Share of the free memory that state may take where the plan does not say."""

RECURRENT_SHARE = 0.5
"""Share of the state's memory that recurrent groups leave to others where both want more."""

STATES = 2
"""Recurrent states that a sequence holds in a step: the one it reads, the one it writes."""

SNAPSHOTS = 2
"""Recurrent states for each running sequence that are kept for prompts to come: where its
prompt ended, and one more."""


def least_blocks(group: StateGroup, block_size: int) -> int:
    """Blocks of a group without which no sequence runs."""
    if group.kind == "recurrent":
        return STATES
    return _ceil(group.window, block_size) + 2


def most_blocks(group: StateGroup, block_size: int, chunk: int, steps: int = 1) -> int:
    """The most blocks of a group that one sequence holds, in chunks of ``chunk`` tokens; 0 where
    that grows with its length. ``steps`` may be in flight at once: what a step leaves behind
    is held until it has been collected."""
    if group.kind == "recurrent":
        return STATES - 1 + steps
    if not group.window:
        return 0
    return _ceil(group.window, block_size) + 1 + steps * _ceil(chunk, block_size)


def size_state(
    groups: Sequence[StateGroup],
    block_bytes: Sequence[int],
    plan: ExecutionPlan,
    context_length: int,
    free_bytes: int,
    share: float = MEMORY_SHARE,
) -> tuple[int, ...]:
    """Blocks of each state group, given the bytes of a block.

    The budget is ``plan.state_bytes``, else a ``share`` of ``free_bytes``. No group gets more than
    ``plan.max_sequences`` full contexts need, nor a window group more than its windows and
    chunks need, nor a recurrent group more than the states of running sequences and some
    snapshots. A short sequence needs equally many blocks of every paged group, so below these
    bounds all of them get equally many. Recurrent blocks are large, and their number does not
    grow with the length: they get up to half of the budget, and what the others leave over.
    CapacityError when that is too little to run at all.
    """
    size = plan.block_size
    budget = plan.state_bytes or int(free_bytes * share)
    whole = _ceil(context_length, size)
    least, bounds = [], []
    for group in groups:
        needed = least_blocks(group, size)
        least.append(needed)
        if group.kind == "recurrent":
            most = STATES + SNAPSHOTS
        else:
            most = most_blocks(group, size, plan.max_batch_tokens)
            most = min(whole, most + 1) if most else whole
        bounds.append(max(plan.max_sequences * most, needed))
    counts = [0] * len(groups)
    recurrent = [g for g, group in enumerate(groups) if group.kind == "recurrent"]
    paged = [g for g in range(len(groups)) if g not in recurrent]
    # Equally many of every paged group, so the one that needs most decides.
    paged_least = max((least[g] for g in paged), default=0) * sum(block_bytes[g] for g in paged)
    recurrent_least = sum(least[g] * block_bytes[g] for g in recurrent)
    if recurrent:
        others = sum(bounds[g] * block_bytes[g] for g in paged)
        own = max(budget - others, int(budget * RECURRENT_SHARE))
        own = max(min(own, budget - paged_least), min(recurrent_least, budget))
        budget -= _share(recurrent, bounds, block_bytes, own, counts)
    _share(paged, bounds, block_bytes, budget, counts)
    for count, needed in zip(counts, least, strict=True):
        if count < needed:
            source = "plan: state_bytes" if plan.state_bytes else f"{share:.0%} of the free memory"
            raise CapacityError(
                f"{source} holds {count} state blocks of {size} tokens, but at least {needed} are "
                "needed",
                advice=(
                    f"a {{}} of {paged_least + recurrent_least} or more will do",
                    ("state_bytes",),
                ),
            )
    return tuple(counts)


def _share(
    groups: Sequence[int],
    bounds: Sequence[int],
    block_bytes: Sequence[int],
    budget: int,
    counts: list[int],
) -> int:
    """Gives equally many blocks to each of some groups, up to its bound; the bytes of that."""
    left = list(groups)
    spent = 0
    while left:
        share = (budget - spent) // sum(block_bytes[g] for g in left)
        # The tightest bound first: what it leaves over is for the others.
        group = min(left, key=bounds.__getitem__)
        if bounds[group] > share:
            for g in left:
                counts[g] = share
            return spent + share * sum(block_bytes[g] for g in left)
        counts[group] = bounds[group]
        spent += bounds[group] * block_bytes[group]
        left.remove(group)
    return spent


def _ceil(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)
