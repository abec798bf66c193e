"""What running sequences keep, found by the state blocks that the engine gave them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sartor.engine.fallback.causal_lm import nbytes
from sartor.graph import Batch, StateGroup

Block = tuple[int, int]
"""Group and number."""


@dataclass(eq=False)
class Memory:
    """A sequence's memory (see :class:`CausalLM`) and the blocks that stand for it."""

    content: Any = None
    blocks: set[Block] = field(default_factory=set)


class Memories:
    """The engine counts blocks; here is the object that each of them is a part of.

    Nobody says when a sequence ends: its blocks turn up in another one, and then its memory
    goes. So what is held never exceeds what the engine's blocks allow, as with state that is
    allocated at once.
    """

    def __init__(self, groups: Sequence[StateGroup], block_size: int) -> None:
        self._groups = groups
        self._block_size = block_size
        self._owners: dict[Block, Memory] = {}

    def __len__(self) -> int:
        return len({id(memory) for memory in self._owners.values()})

    @property
    def nbytes(self) -> int:
        distinct = {id(memory): memory for memory in self._owners.values()}
        return sum(nbytes(memory.content) for memory in distinct.values())

    def claim(self, batch: Batch, sequence: int) -> Memory:
        """The memory of a sequence of a batch, which owns the blocks of this step from now on;
        an empty one at its start."""
        context = int(batch.contexts[sequence])
        count = int(batch.starts[sequence + 1] - batch.starts[sequence])
        last = (context + count - 1) // self._block_size
        memory = Memory()
        if context:
            before = (context - 1) // self._block_size
            memory = self._owners[0, int(batch.block_tables[0][sequence, before])]
        wanted = set()
        for group in self._groups:
            row = batch.block_tables[group.index][sequence]
            # Of a recurrent group only what is written: the block that was read will be free.
            first = last if group.kind == "recurrent" else 0
            wanted |= {(group.index, block) for block in row[first : last + 1].tolist()}
        for block in memory.blocks - wanted:
            del self._owners[block]
        for block in wanted - memory.blocks:
            ended = self._owners.get(block)
            if ended is not None:
                self._forget(ended)
            self._owners[block] = memory
        memory.blocks = wanted
        return memory

    def clear(self) -> None:
        for memory in list(self._owners.values()):
            self._forget(memory)

    def _forget(self, memory: Memory) -> None:
        for block in memory.blocks:
            del self._owners[block]
        memory.blocks = set()
        memory.content = None
