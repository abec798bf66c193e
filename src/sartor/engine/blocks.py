"""Blocks of one state group: who holds each, which are free, which are worth keeping."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from sartor.errors import CapacityError

T = TypeVar("T")


class BlockPool(Generic[T]):
    """Reference counts of ``total`` blocks.

    A block is *held* (by as many sequences as ``references`` says), *cached* (held by none,
    but its content belongs to a ``keeper`` that may hand it out again) or *free*. Allocation
    takes a free block, else the cached one released longest ago; its keeper is told first.
    """

    def __init__(self, total: int, evict: Callable[[T, int], None]) -> None:
        """``evict(keeper, block)`` is called before a cached block gets a new use."""
        self.total = total
        self.references = [0] * total
        self.keepers: list[T | None] = [None] * total
        self._evict = evict
        self._free = list(range(total - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        return len(self._cached)

    def allocate(self) -> int:
        """A block held once. CapacityError when every block is held."""
        if self._free:
            block = self._free.pop()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            keeper = self.keepers[block]
            assert keeper is not None
            self.keepers[block] = None
            self._evict(keeper, block)
        else:
            raise CapacityError(
                f"all {self.total} state blocks are in use", advice=("raise {}", ("state_bytes",))
            )
        self.references[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One more holder of a held or cached block."""
        if self.references[block] == 0:
            del self._cached[block]
        self.references[block] += 1

    def release(self, block: int) -> None:
        """One holder less; without holders a kept block is cached, any other is free."""
        self.references[block] -= 1
        if self.references[block] == 0:
            if self.keepers[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def keep(self, block: int, keeper: T) -> None:
        """The content of a held block belongs to ``keeper`` from now on."""
        self.keepers[block] = keeper

    def discard(self, block: int) -> None:
        """Ends the keeping of a block; a cached one becomes free."""
        self.keepers[block] = None
        if self.references[block] == 0:
            del self._cached[block]
            self._free.append(block)

    def check(self, holders: dict[int, int]) -> None:
        """Asserts that the books agree with ``holders``: holders of each held block."""
        held = {b: count for b, count in enumerate(self.references) if count}
        assert held == holders, f"references {held} but holders {holders}"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached, "a free block is cached"
        assert not (free | cached) & held.keys(), "a held block is free or cached"
        assert len(free) + len(cached) + len(held) == self.total, "a block was lost"
        assert all(self.keepers[b] is None for b in free), "a free block has a keeper"
        assert all(self.keepers[b] is not None for b in cached), "a cached block has no keeper"
