"""The program that a model builds, and the values that cross the backend contract."""

from sartor.graph.adapter import LowRank
from sartor.graph.batch import SAMPLING_ROW, Batch, Ragged, StepOutput
from sartor.graph.builder import Builder
from sartor.graph.capabilities import Capabilities
from sartor.graph.program import (
    KVStateSpec,
    LatentStateSpec,
    Node,
    Program,
    RecurrentStateSpec,
    StateGroup,
    StateSpec,
    Value,
    WeightSpec,
)
from sartor.graph.sampling import (
    SAMPLING_LIMITS,
    UNSAID,
    SamplingDefaults,
    SamplingParams,
    describe_sampling,
    sampling_in_effect,
)
from sartor.graph.work import ProgramWork, StepShape

__all__ = [
    "SAMPLING_LIMITS",
    "SAMPLING_ROW",
    "UNSAID",
    "Batch",
    "Builder",
    "Capabilities",
    "KVStateSpec",
    "LatentStateSpec",
    "LowRank",
    "Node",
    "Program",
    "ProgramWork",
    "Ragged",
    "RecurrentStateSpec",
    "SamplingDefaults",
    "SamplingParams",
    "StateGroup",
    "StateSpec",
    "StepOutput",
    "StepShape",
    "Value",
    "WeightSpec",
    "describe_sampling",
    "sampling_in_effect",
]
