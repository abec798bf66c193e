"""Which computed blocks exist for which tokens: the tree behind prefix sharing."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

from sartor.engine.blocks import BlockPool

NONE = -1
"""No block held at this place of a table."""


class Node:
    """One whole block of tokens after those of its parent.

    ``blocks`` has the block of each state group, :data:`NONE` where a group's was evicted.
    ``pins`` counts running sequences that will add their next block below this node.
    """

    __slots__ = ("blocks", "children", "key", "parent", "pins")

    def __init__(self, parent: Node | None, key: Hashable, groups: int) -> None:
        self.parent = parent
        self.key = key
        self.blocks = [NONE] * groups
        self.children: dict[Hashable, Node] = {}
        self.pins = 0


class PrefixTree:
    """A tree over whole blocks, keyed by their exact tokens: nothing rests on a hash.

    The root key holds everything beside the tokens that the state depends on. A group with a
    window needs only the blocks that the next position can see; the full groups need all. A
    recurrent group (window 2) needs the last one: nodes on the way may never have had one.
    """

    def __init__(self, windows: Sequence[int], block_size: int) -> None:
        self._full = [g for g, window in enumerate(windows) if not window]
        # The position after a prefix sees the window - 1 positions before it.
        self._tails = [
            (g, -(-(window - 1) // block_size)) for g, window in enumerate(windows) if window
        ]
        self._groups = len(windows)
        self._roots: dict[Hashable, Node] = {}
        self.pools: list[BlockPool[Node]] = []

    def match(self, root: Hashable, keys: Iterator[bytes]) -> list[Node]:
        """Nodes, one a block, of the longest prefix of ``keys`` that a sequence can go on from.

        ``keys`` are the token bytes of each whole block.
        """
        node = self._roots.get(root)
        if node is None:
            return []
        path: list[Node] = []
        runs = [0] * len(self._tails)
        usable = 0
        full, tails = self._full, self._tails
        for key in keys:  # thousands of a long prompt, and again at each step that it waits
            node = node.children.get(key)
            if node is None:
                break
            blocks = node.blocks
            if NONE in blocks and any(blocks[g] == NONE for g in full):
                break
            path.append(node)
            if not tails:
                continue
            enough = True
            for i, (group, tail) in enumerate(tails):
                runs[i] = runs[i] + 1 if blocks[group] != NONE else 0
                enough = enough and runs[i] >= min(tail, len(path))
            if enough:
                usable = len(path)
        return path[:usable] if tails else path

    def root(self, key: Hashable) -> Node:
        """The root of a key, made where it is missing."""
        node = self._roots.get(key)
        if node is None:
            node = self._roots[key] = Node(None, key, self._groups)
        return node

    def child(self, parent: Node, key: bytes) -> Node:
        """The node of a block below ``parent``, made (without blocks) where it is missing."""
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = Node(parent, key, self._groups)
        return node

    def pin(self, node: Node) -> None:
        node.pins += 1

    def unpin(self, node: Node) -> None:
        node.pins -= 1
        self._prune(node)

    def evict(self, node: Node, group: int) -> None:
        """A group's block of ``node`` gets a new use. Without a full group's block the rest is
        worthless: nothing can go on from here."""
        node.blocks[group] = NONE
        if group in self._full:
            for other, block in enumerate(node.blocks):
                if block != NONE:
                    node.blocks[other] = NONE
                    self.pools[other].discard(block)
        self._prune(node)

    def _prune(self, node: Node) -> None:
        while not node.pins and not node.children and all(b == NONE for b in node.blocks):
            parent = node.parent
            if parent is None:
                self._roots.pop(node.key, None)
                return
            if parent.children.get(node.key) is not node:
                return
            del parent.children[node.key]
            node = parent

    def nodes(self) -> Iterator[Node]:
        """Every node, roots included."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check(self) -> None:
        """Asserts that tree and pools agree on who keeps what, and that nothing is left over."""
        kept: list[dict[int, Node]] = [{} for _ in self.pools]
        for node in self.nodes():
            assert node.pins >= 0
            assert node.pins or node.children or any(b != NONE for b in node.blocks), "dead node"
            for group, block in enumerate(node.blocks):
                if block != NONE:
                    assert block not in kept[group], "two nodes keep one block"
                    kept[group][block] = node
        for pool, expected in zip(self.pools, kept, strict=True):
            books = {b: k for b, k in enumerate(pool.keepers) if k is not None}
            assert books == expected, "tree and pool disagree on what is kept"
