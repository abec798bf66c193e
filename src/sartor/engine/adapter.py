"""The adapters of an engine: names for people, numbers for batches, and when each may go."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sartor.backends.base import Executable
from sartor.errors import UnsupportedError, UsageError
from sartor.graph import LowRank
from sartor.graph.batch import F32


@dataclass(eq=False)
class Adapter:
    """One loaded adapter.

    ``index`` is the number by which batches name it; numbers are used again. ``generation``
    never is: it separates the prefixes of adapters that had the same name or number. ``users``
    counts sequences that run, or wait to run, with it.
    """

    name: str
    index: int
    generation: int
    users: int = 0
    dropped: bool = False


class AdapterTable:
    """Loads adapters into an executable and frees each when nobody needs it any more."""

    def __init__(self, executable: Executable, supported: bool) -> None:
        """``supported``: what the backend's capabilities say about adapters."""
        self._executable = executable
        self._supported = supported
        program = executable.program
        specs = program.weight_values()
        self._shapes = {
            specs[node.inputs[1]].name: specs[node.inputs[1]].shape
            for node in program.nodes
            if node.op == "linear"
        }
        self._by_name: dict[str, Adapter] = {}
        self._numbers: set[int] = set()
        self._generations = itertools.count(1)

    @property
    def names(self) -> tuple[str, ...]:
        """Adapters that requests may ask for."""
        return tuple(self._by_name)

    def load(self, name: str, layers: Mapping[str, LowRank]) -> None:
        """Makes an adapter known; ``layers`` by the name of the weight that they adapt.

        Errors: UnsupportedError where the backend has no adapters, UsageError for a name in
        use, and for layers that the model does not have or that do not fit.
        """
        if not self._supported:
            raise UnsupportedError(
                f"adapter {name}: backend {self._executable.plan.backend} does not run adapters; "
                "choose another backend"
            )
        if not name:
            raise UsageError("an adapter needs a name; give it one")
        if name in self._by_name:
            raise UsageError(f"adapter {name} is loaded already; drop it first, or rename this one")
        if not layers:
            raise UsageError(f"adapter {name} adapts no layer; check where it comes from")
        checked = {weight: self._checked(name, weight, layers[weight]) for weight in layers}
        index = next(i for i in itertools.count() if i not in self._numbers)
        self._executable.load_adapter(index, checked)
        self._numbers.add(index)
        self._by_name[name] = Adapter(name, index, next(self._generations))

    def drop(self, name: str) -> None:
        """Takes an adapter away from new requests, and frees it when the last one that runs
        with it has ended. UsageError for an unknown name."""
        adapter = self._find(name, f"adapter {name!r}")
        del self._by_name[name]
        adapter.dropped = True
        self._free_unused(adapter)

    def find(self, name: str, request_id: str) -> Adapter:
        """The adapter that a request names; UsageError lists those that are loaded."""
        return self._find(name, f"request {request_id}: adapter {name!r}")

    def acquire(self, adapter: Adapter) -> None:
        """One more sequence needs it."""
        adapter.users += 1

    def release(self, adapter: Adapter) -> None:
        """One sequence less needs it; no later batch of that sequence will name it."""
        adapter.users -= 1
        self._free_unused(adapter)

    def _find(self, name: str, what: str) -> Adapter:
        if name not in self._by_name:
            known = f"loaded are {', '.join(self._by_name)}" if self._by_name else "none is"
            raise UsageError(f"{what} is not loaded; {known}")
        return self._by_name[name]

    def _free_unused(self, adapter: Adapter) -> None:
        if adapter.dropped and not adapter.users:
            self._executable.drop_adapter(adapter.index)
            self._numbers.remove(adapter.index)

    def _checked(self, name: str, weight: str, layer: LowRank) -> LowRank:
        where = f"adapter {name}: layer {weight}"
        shape = self._shapes.get(weight)
        if shape is None:
            raise UsageError(
                f"{where}: the model has no linear layer with this weight; they are named like "
                f"{next(iter(self._shapes), 'none')}"
            )
        down, up = layer.down, layer.up
        rank = down.shape[0] if down.ndim else 0
        rows, columns = shape
        if not rank or down.shape != (rank, columns) or up.shape != (rows, rank):
            raise UsageError(
                f"{where}: down {list(down.shape)} and up {list(up.shape)} do not fit a weight of "
                f"{list(shape)}; they must be [r, {columns}] and [{rows}, r] with one rank r"
            )
        if not (np.isfinite(down).all() and np.isfinite(up).all()):
            raise UsageError(f"{where}: has numbers that are not finite")
        return LowRank(_float32(down), _float32(up))


def _float32(array: F32) -> F32:
    return np.ascontiguousarray(array, np.float32)
