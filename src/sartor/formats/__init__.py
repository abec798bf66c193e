"""Checkpoints on disk: GGUF, safetensors, and Sartor's own packed files."""

from sartor.formats.checkpoint import Checkpoint, open_checkpoint, verify
from sartor.formats.files import TensorInfo, UnsupportedTensorError
from sartor.formats.packed import PackedFile, PackedWriter, collect_garbage, write_packed

__all__ = [
    "Checkpoint",
    "PackedFile",
    "PackedWriter",
    "TensorInfo",
    "UnsupportedTensorError",
    "collect_garbage",
    "open_checkpoint",
    "verify",
    "write_packed",
]
