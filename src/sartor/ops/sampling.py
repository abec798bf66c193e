"""What sampling means: from a row of logits to one token.

Order: repetition, presence and frequency penalties, logit bias, then greedy (temperature 0)
or temperature, top-k, top-p, min-p and one draw. Random numbers are counter-based, a pure
function of (seed, choice, position), so a replayed request draws the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sartor.ops.weights import F32

I32 = npt.NDArray[np.int32]
_MASK = (1 << 64) - 1


def mix64(x: int) -> int:
    """The splitmix64 finaliser (Steele, Lea, Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, fixed by its three arguments."""
    counter = ((choice & 0xFFFFFFFF) << 32) | (position & 0xFFFFFFFF)
    return (mix64(mix64(seed & _MASK) ^ counter) >> 11) * 2.0**-53


@dataclass(frozen=True)
class SampleRow:
    """What one row needs to choose its token. ``history`` is prompt and output so far.

    ``prompt_length`` splits the history: presence and frequency penalties count the output
    only, the repetition penalty (arXiv:1909.05858) the prompt too.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    choice: int = 0
    position: int = 0
    prompt_length: int = 0
    history: tuple[int, ...] = ()
    bias: tuple[tuple[int, float], ...] = ()


def adjust(logits: F32, row: SampleRow) -> F32:
    """Logits after penalties and bias: float32 ``[vocab]``."""
    out = logits.astype(np.float32).copy()
    if row.history:
        seen = np.unique(np.asarray(row.history, np.int64))
        values = out[seen]
        penalty = np.float32(row.repetition_penalty)
        out[seen] = np.where(values > 0, values / penalty, values * penalty)
        written, counts = np.unique(
            np.asarray(row.history[row.prompt_length :], np.int64), return_counts=True
        )
        out[written] -= np.float32(row.presence_penalty)
        out[written] -= np.float32(row.frequency_penalty) * counts.astype(np.float32)
    for token, value in row.bias:
        out[token] += np.float32(value)
    return out


def sample_row(logits: F32, row: SampleRow) -> int:
    """The chosen token of one row of logits; ties go to the lowest id."""
    logits = adjust(logits, row)
    if row.temperature == 0:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / row.temperature
    order = np.lexsort((np.arange(len(scaled)), -scaled))
    if row.top_k > 0:
        order = order[: row.top_k]
    weights = np.exp(scaled[order] - scaled[order[0]])
    probabilities = weights / weights.sum()
    before = np.cumsum(probabilities) - probabilities
    keep = (before < row.top_p) & (probabilities >= row.min_p * probabilities[0])
    keep[0] = True
    ids = np.sort(order[keep])  # the draw goes by id, so that nobody has to sort a vocabulary
    kept = np.exp(scaled[ids] - scaled[order[0]])
    target = uniform(row.seed, row.choice, row.position) * kept.sum()
    index = int(np.searchsorted(np.cumsum(kept), target, side="right"))
    return int(ids[min(index, len(kept) - 1)])


def log_softmax(logits: F32) -> F32:
    """Natural log probabilities of raw logits, before penalties and temperature.

    Float32 but for the sum: which logits have the same log probability depends on its last bit.
    """
    shifted = logits - logits.max(axis=-1, keepdims=True)
    total = np.exp(shifted, dtype=np.float64).sum(axis=-1, keepdims=True)
    out: F32 = shifted - np.log(total).astype(np.float32)
    return out.astype(np.float32, copy=False)
