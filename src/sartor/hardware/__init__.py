"""What this machine has: processors, memory and, once measured, its ceilings."""

from sartor.hardware.inventory import (
    Ceilings,
    Inventory,
    available_cores,
    cpu_name,
    inventory,
    memory,
)

__all__ = ["Ceilings", "Inventory", "available_cores", "cpu_name", "inventory", "memory"]
