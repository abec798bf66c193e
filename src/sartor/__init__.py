"""Sartor fits language models to the hardware people already have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "ExecutionPlan", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from sartor.engine.llm import LLM
    from sartor.graph import SamplingParams
    from sartor.plan import ExecutionPlan

_HOMES = {
    "LLM": "sartor.engine.llm",
    "SamplingParams": "sartor.graph",
    "ExecutionPlan": "sartor.plan",
}


def __getattr__(name: str) -> Any:
    # Imported where used: `sartor --help` must not pay for the engine.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sartor' has no attribute {name!r}")
