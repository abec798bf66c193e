"""What this machine has: processors, memory and, once measured, its ceilings."""

from sartor.hardware.inventory import (
    Inventory,
    available_cores,
    cpu_name,
    inventory,
    memory,
    physical_cores,
)
from sartor.hardware.ledger import Lease, MemoryLedger, in_megabytes
from sartor.hardware.roofline import Arithmetic, Bound, Ceilings, Limit, Peak, Work, bound

__all__ = [
    "Arithmetic",
    "Bound",
    "Ceilings",
    "Inventory",
    "Lease",
    "Limit",
    "MemoryLedger",
    "Peak",
    "Work",
    "available_cores",
    "bound",
    "cpu_name",
    "in_megabytes",
    "inventory",
    "memory",
    "physical_cores",
]
