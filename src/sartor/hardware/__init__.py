"""What this machine has: processors, memory and, once measured, its ceilings."""

from sartor.hardware.inventory import Inventory, available_cores, cpu_name, inventory

__all__ = ["Inventory", "available_cores", "cpu_name", "inventory"]
