"""The execution plan: every choice about how a model runs, as one validated value."""

from sartor.plan.plan import ActivationFormat, ExecutionPlan, KVFormat

__all__ = ["ActivationFormat", "ExecutionPlan", "KVFormat"]
