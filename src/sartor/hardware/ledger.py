"""Who holds how much of a device's memory, up to a limit."""

from __future__ import annotations

from dataclasses import dataclass

from sartor.errors import CapacityError


@dataclass(frozen=True)
class Lease:
    """Bytes that an owner (a model, the process) holds for a purpose (weights, state, ...)."""

    owner: str
    purpose: str
    nbytes: int


class MemoryLedger:
    """Leases of at most ``limit`` bytes in all; None counts without a limit."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._leases: dict[tuple[str, str], int] = {}

    @property
    def leases(self) -> tuple[Lease, ...]:
        return tuple(Lease(*key, nbytes) for key, nbytes in self._leases.items())

    @property
    def used(self) -> int:
        return sum(self._leases.values())

    @property
    def free(self) -> int | None:
        """Bytes that can still be leased; None without a limit."""
        return None if self.limit is None else self.limit - self.used

    def lease(self, owner: str, purpose: str, nbytes: int) -> None:
        """Takes bytes, in place of what the owner had for that purpose. CapacityError, which says
        who holds what, where they do not fit; nothing has changed then."""
        before = self._leases.get((owner, purpose), 0)
        if self.free is not None and nbytes - before > self.free:
            held = ", ".join(
                f"{lease.owner} {lease.purpose} {in_megabytes(lease.nbytes)}"
                for lease in self.leases
            )
            raise CapacityError(
                f"{owner}: {in_megabytes(nbytes)} of {purpose} do not fit into the memory limit of "
                f"{in_megabytes(self.limit or 0)}, of which are taken: {held or 'nothing'}; raise "
                "--memory, or take a smaller model or fewer of them"
            )
        self._leases[owner, purpose] = nbytes

    def release(self, owner: str) -> None:
        """Gives back everything that an owner holds."""
        for key in [key for key in self._leases if key[0] == owner]:
            del self._leases[key]


def in_megabytes(nbytes: int) -> str:
    """For people, in units of 10^6 bytes, rounded up."""
    return f"{-(-nbytes // 10**6):,} MB"
