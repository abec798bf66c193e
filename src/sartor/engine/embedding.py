"""Prompts that hold vectors beside tokens: what an image encoder gave, say."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sartor.errors import UsageError
from sartor.graph.batch import F32, I32

_STORED = np.dtype("<f4")


@dataclass(frozen=True)
class EmbeddingSegment:
    """Vectors that take the place of token embeddings from prompt position ``start`` on.

    ``data`` holds them as little-endian float32 ``[n, width]``, row by row: bytes, so that a
    request can go to another process.
    """

    start: int
    width: int
    data: bytes

    def __post_init__(self) -> None:
        if self.start < 0 or self.width < 1:
            raise UsageError(
                f"embedding segment: start {self.start} and width {self.width} are impossible; "
                "it starts at a prompt position and has at least one feature"
            )
        if not self.data or len(self.data) % (_STORED.itemsize * self.width):
            raise UsageError(
                f"embedding segment at {self.start}: {len(self.data)} bytes are not whole float32 "
                f"vectors of {self.width} features"
            )

    @staticmethod
    def of(start: int, vectors: npt.ArrayLike) -> EmbeddingSegment:
        """A segment of an array ``[n, width]``, or of anything that numpy makes one of."""
        array = np.asarray(vectors)
        if array.ndim != 2 or not array.size or array.dtype.kind not in "fiu":
            raise UsageError(
                f"embedding segment at {start}: an array of {array.dtype} of shape "
                f"{list(array.shape)}; give numbers of shape [n, hidden size]"
            )
        return EmbeddingSegment(start, array.shape[1], array.astype(_STORED).tobytes())

    @property
    def vectors(self) -> F32:
        """Float32 ``[n, width]``; a view of ``data``."""
        return (
            np.frombuffer(self.data, _STORED).reshape(-1, self.width).astype(np.float32, copy=False)
        )

    @property
    def stop(self) -> int:
        """The position after the last vector."""
        return self.start + len(self.data) // (_STORED.itemsize * self.width)


class EmbeddedRows:
    """All vectors of a prompt by position, checked; shared by the choices of a request."""

    def __init__(
        self, name: str, segments: Sequence[EmbeddingSegment], prompt_length: int, width: int
    ) -> None:
        """``name`` is the request's, ``width`` the model's hidden size (0: it takes no vectors).

        UsageError for segments that do not fit the model, the prompt or each other, and for
        numbers that are not finite.
        """
        where = f"request {name}: the embedding segment at"
        if not width:
            raise UsageError(f"{where} {segments[0].start}: this model takes tokens only")
        segments = sorted(segments, key=lambda segment: segment.start)
        end = 0
        for segment in segments:
            if segment.width != width:
                raise UsageError(
                    f"{where} {segment.start} has vectors of {segment.width} features, but the "
                    f"hidden size of this model is {width}; give vectors made for it"
                )
            if segment.start < end:
                raise UsageError(f"{where} {segment.start} overlaps the one that ends at {end}")
            end = segment.stop
            if end > prompt_length:
                raise UsageError(
                    f"{where} {segment.start} ends at {end}, beyond the prompt of "
                    f"{prompt_length} tokens; the prompt has a placeholder for every vector"
                )
            if not np.isfinite(segment.vectors).all():
                raise UsageError(f"{where} {segment.start} has numbers that are not finite")
        self._positions: I32 = np.concatenate(
            [np.arange(segment.start, segment.stop, dtype=np.int32) for segment in segments]
        )
        self._vectors: F32 = np.concatenate([segment.vectors for segment in segments])
        self._digests: dict[tuple[int, int], bytes] = {}

    def between(self, start: int, stop: int) -> tuple[I32, F32]:
        """Positions in ``[start, stop)`` that have a vector, and the vectors."""
        low, high = np.searchsorted(self._positions, (start, stop))
        return self._positions[low:high], self._vectors[low:high]

    def digest(self, start: int, stop: int) -> bytes:
        """Stands for the vectors of ``[start, stop)`` and their places; empty where there are
        none. Kept, because a waiting request is compared at every step."""
        key = (start, stop)
        if key not in self._digests:
            positions, vectors = self.between(start, stop)
            parts = positions.tobytes() + vectors.tobytes()
            self._digests[key] = hashlib.sha256(parts).digest() if len(positions) else b""
        return self._digests[key]
