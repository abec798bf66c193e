"""The state cache: blocks of every state group, and which sequence holds which of them."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as List
from dataclasses import dataclass
from functools import partial

import numpy as np

from sartor.engine.blocks import BlockPool
from sartor.engine.prefix import NONE, Node, PrefixTree
from sartor.engine.sequence import Sequence
from sartor.graph.batch import I32
from sartor.graph.program import StateGroup

_MOST_STATES = 3
"""Recurrent states that a sequence holds at most: with two steps in flight, the one that the
first of them reads and those that they write."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """What admitting a waiting sequence would reuse, and what that takes.

    ``tokens`` need no computing; ``cost`` is, per group, the cached blocks that stop being
    available. ``hold`` asks to wait: another sequence is computing more of the same prefix.
    Where ``fork`` is set, the last of the tokens are those of a partial block: that of a running
    sequence, which is copied; without a prefix tree its whole blocks are held too.
    """

    nodes: tuple[Node, ...]
    tokens: int
    cost: tuple[int, ...]
    hold: bool = False
    fork: Sequence | None = None


class StateCache:
    """Hands out blocks of ``block_size`` positions, alike in all groups of one program.

    All groups hold blocks up to the same end; a group with a window gives back those that
    slid out of it. Whole computed blocks enter the prefix tree, and stay cached there when
    their last holder leaves, until their memory is needed. Two sequences that compute equal
    blocks end up sharing one.

    A recurrent group (:class:`~sartor.graph.program.StateGroup`) takes a block only for the run
    in which a step ends. Where a step ends exactly with its run, that block is a snapshot: it
    is whole and enters the tree, and the next step reads it and writes a new one.

    ``tables[g]`` is int32 ``[max_sequences, blocks of a full context]``, one row a slot.
    """

    def __init__(
        self,
        groups: List[StateGroup],
        blocks: List[int],
        *,
        block_size: int,
        max_sequences: int,
        max_context: int,
        prefix_cache: bool,
    ) -> None:
        """``blocks``: how many each group has."""
        self.windows = tuple(group.window for group in groups)
        self._recurrent = tuple(group.kind == "recurrent" for group in groups)
        self.block_size = block_size
        self.max_sequences = max_sequences
        self._tree = PrefixTree(self.windows, block_size)
        self._prefix_cache = prefix_cache
        self.pools: list[BlockPool[Node]] = [
            BlockPool(total, partial(self._evict, group)) for group, total in enumerate(blocks)
        ]
        self._tree.pools = self.pools
        shape = (max_sequences, -(-max_context // block_size))
        self.tables = [np.full(shape, NONE, np.int32) for _ in blocks]
        self._slots = list(range(max_sequences - 1, -1, -1))

    def _evict(self, group: int, node: Node, block: int) -> None:
        assert node.blocks[group] == block
        self._tree.evict(node, group)

    def available(self) -> tuple[int, ...]:
        """Blocks of each group that nobody holds."""
        return tuple(pool.available for pool in self.pools)

    def first_visible(self, group: int, position: int) -> int:
        """The first block that a token at ``position`` sees; 0 in a full group."""
        window = self.windows[group]
        return max(0, (position - window + 1) // self.block_size) if window else 0

    def match(self, sequence: Sequence) -> Prefix:
        """The prefix of a waiting sequence that is in the cache; changes nothing."""
        nodes: list[Node] = []
        if self._prefix_cache:
            nodes = self._tree.match(sequence.root, sequence.block_keys(self.block_size))
        tokens = len(nodes) * self.block_size
        return Prefix(tuple(nodes), tokens, self._cost(nodes, tokens))

    def _cost(self, nodes: List[Node], tokens: int) -> tuple[int, ...]:
        return tuple(
            sum(not pool.references[n.blocks[g]] for n in nodes[self.first_visible(g, tokens) :])
            for g, pool in enumerate(self.pools)
        )

    def fork(self, prefix: Prefix, other: Sequence, tokens: int) -> Prefix | None:
        """``prefix`` and what follows it up to ``tokens``, from a running sequence that has
        computed these same tokens; changes nothing. None where a block that it takes is gone,
        because a window slid on, or not in the tree yet. Not for programs with recurrent groups.
        """
        whole = tokens // self.block_size
        if self._prefix_cache and len(prefix.nodes) < whole:
            return None
        for group in range(len(self.pools)):
            needed = whole if self._prefix_cache else self.first_visible(group, tokens)
            if other.first[group] > needed:
                return None
        return Prefix(prefix.nodes, tokens, self._cost(prefix.nodes, tokens), fork=other)

    def admit(self, sequence: Sequence, prefix: Prefix) -> None:
        """Gives a waiting sequence a slot and the blocks of its prefix."""
        sequence.slot = self._slots.pop()
        sequence.computed = sequence.start = prefix.tokens
        sequence.end = whole = prefix.tokens // self.block_size
        sequence.shared = len(prefix.nodes)
        sequence.first = []
        other = prefix.fork
        if other is not None and prefix.tokens % self.block_size:
            sequence.copied = tuple(int(table[other.slot, whole]) for table in self.tables)
        for group, pool in enumerate(self.pools):
            first = self.first_visible(group, prefix.tokens)
            sequence.first.append(first)
            if other is None or self._prefix_cache:
                held = [node.blocks[group] for node in prefix.nodes[first:]]
            else:
                held = self.tables[group][other.slot, first:whole].tolist()
            for block in held:
                pool.hold(block)
            self.tables[group][sequence.slot, first:whole] = held
        if self._prefix_cache:
            sequence.node = prefix.nodes[-1] if prefix.nodes else self._tree.root(sequence.root)
            self._tree.pin(sequence.node)

    def extend(self, sequence: Sequence, length: int) -> None:
        """Holds blocks for all positions below ``length``; CapacityError when none are left."""
        end = -(-length // self.block_size)
        if end <= sequence.end:
            return
        taken: list[tuple[int, int, int]] = []
        try:
            for group, pool in enumerate(self.pools):
                first = end - 1 if self._recurrent[group] else sequence.end
                for index in range(first, end):
                    taken.append((group, index, pool.allocate()))
        except BaseException:
            for group, _, block in taken:
                self.pools[group].release(block)
            raise
        for group, index, block in taken:
            self.tables[group][sequence.slot, index] = block
        sequence.end = end

    def commit(self, sequence: Sequence, computed: int) -> None:
        """The state of the first ``computed`` tokens is there: shares whole blocks, and drops
        what slid out of a window. A step in flight may be writing what comes after them."""
        whole = computed // self.block_size
        if self._prefix_cache:
            while sequence.shared < whole:
                snapshot = computed == (sequence.shared + 1) * self.block_size
                self._share(sequence, sequence.shared, snapshot)
                sequence.shared += 1
        for group, window in enumerate(self.windows):
            if window:
                first = self.first_visible(group, computed)
                self._drop(sequence, group, sequence.first[group], first)
                sequence.first[group] = max(first, sequence.first[group])

    def _share(self, sequence: Sequence, index: int, snapshot: bool) -> None:
        """Puts a whole block into the tree, or swaps it for the equal one that is there.

        ``snapshot``: a step ended with it, so recurrent states were kept.
        """
        assert sequence.node is not None
        node = self._tree.child(sequence.node, sequence.block_key(index, self.block_size))
        for group, pool in enumerate(self.pools):
            if self._recurrent[group] and not snapshot:
                continue  # no state was kept here, or one from within the block
            row = self.tables[group][sequence.slot]
            own, kept = int(row[index]), node.blocks[group]
            if kept == NONE:
                node.blocks[group] = own
                pool.keep(own, node)
            elif kept != own:
                pool.hold(kept)
                pool.release(own)
                row[index] = kept
        self._tree.pin(node)
        self._tree.unpin(sequence.node)
        sequence.node = node

    def _drop(self, sequence: Sequence, group: int, start: int, stop: int) -> None:
        if start >= stop:
            return
        row = self.tables[group][sequence.slot]
        # The deepest first: they are the least likely to be asked for again.
        for block in row[start:stop][::-1].tolist():
            if block != NONE:
                self.pools[group].release(block)
        row[start:stop] = NONE

    def release(self, sequence: Sequence) -> None:
        """Gives back everything that a sequence holds; nothing of it counts as computed."""
        if sequence.slot < 0:
            return
        for group, first in enumerate(sequence.first):
            self._drop(sequence, group, first, sequence.end)
        sequence.copied = ()
        self._slots.append(sequence.slot)
        sequence.slot, sequence.end, sequence.shared, sequence.computed = -1, 0, 0, 0
        sequence.first = []
        if sequence.node is not None:
            self._tree.unpin(sequence.node)
            sequence.node = None

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Asserts that tables, pools and tree agree, given all sequences that have a slot."""
        sequences = list(sequences)
        slots = [s.slot for s in sequences]
        assert sorted(slots + self._slots) == list(range(self.max_sequences)), "slots were lost"
        for group, (pool, table) in enumerate(zip(self.pools, self.tables, strict=True)):
            holders: dict[int, int] = {}
            expected = np.full_like(table, NONE)
            for s in sequences:
                assert s.computed <= s.end * self.block_size, "state without blocks"
                assert s.first[group] <= self.first_visible(group, s.computed), "window too short"
                held: I32 = table[s.slot, s.first[group] : s.end]
                expected[s.slot, s.first[group] : s.end] = held
                if self._recurrent[group]:
                    ends = {s.end - 1, (s.computed - 1) // self.block_size} - {-1}
                    places = {*(np.flatnonzero(held != NONE) + s.first[group]).tolist()}
                    assert ends <= places, "no state where a step ended"
                    assert len(places) <= _MOST_STATES, "states that nobody needs"
                    held = held[held != NONE]
                assert (held != NONE).all(), "a hole in a block table"
                for block in held.tolist():
                    holders[block] = holders.get(block, 0) + 1
            assert (table == expected).all(), "a block table reaches beyond what is held"
            pool.check(holders)
        self._tree.check()
        pins: dict[int, int] = {}
        for s in sequences:
            if s.node is not None:
                pins[id(s.node)] = pins.get(id(s.node), 0) + 1
        assert pins == {id(n): n.pins for n in self._tree.nodes() if n.pins}, "pins do not add up"
