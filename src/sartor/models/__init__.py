"""Model architectures: one file each, built from shared blocks, found through a registry."""

from sartor.models.config import LayerConfig, ModelConfig
from sartor.models.model import Model, WeightSource, load_model
from sartor.models.registry import (
    Architecture,
    UnknownArchitectureError,
    architecture_of,
    architectures,
)
from sartor.models.sampling import own_sampling

__all__ = [
    "Architecture",
    "LayerConfig",
    "Model",
    "ModelConfig",
    "UnknownArchitectureError",
    "WeightSource",
    "architecture_of",
    "architectures",
    "load_model",
    "own_sampling",
]
