"""A few random tokens through a model: how it can continue a sequence, and what that costs.

What a cache promises differs from model to model, and so do the faults: a recurrence that
forgets its state where it is given several tokens at once, positions that start again. So the
model is asked, and its own answer for the whole sequence is the measure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from sartor.engine.fallback.causal_lm import MODES, CausalLM, Mode, nbytes
from sartor.errors import UnsupportedError
from sartor.graph.batch import F32

CHUNKS: dict[Mode, tuple[int, ...]] = {
    "chunked": (4, 2, 2, 2, 2, 2, 2),
    "stepwise": (12, 1, 1, 1, 1),
    "recompute": (8, 8),
}
TOLERANCE = {4: 1e-4, 2: 5e-2}
"""By bytes of the model's numbers: the mean error of the logits over their mean deviation.
Rounding stays below."""

FLOOR = {4: 1e-6, 2: 1e-2}
"""Beyond three times the error of the best mode and this, an error is no rounding: a hybrid that
forgets only its recurrent layers' state between chunks may err by as little as 5e-2."""


_LEAST_BLOCK = 16
"""Tokens of the smallest state block: a sixteenth a token covers the whole in every block."""


@dataclass(frozen=True)
class Probe:
    """What was found.

    vocab           width of the logits
    token_bytes     by which a sequence's memory grows with a token
    fixed_bytes     of a sequence's memory, whatever its length
    """

    mode: Mode
    vocab: int
    token_bytes: int
    fixed_bytes: int


def probe(model: Any, tokens: int) -> Probe:
    """Tries the modes from the fastest on; ``tokens`` ids below it are known to the model.

    UnsupportedError for a model that does not run at all, and for one whose answers are no
    function of the tokens before them.
    """
    ids = np.random.default_rng(0).integers(0, tokens, sum(CHUNKS["recompute"])).tolist()
    try:
        whole, _ = CausalLM(model, "recompute").step(ids, None, len(ids))
    except Exception as error:  # it needs other inputs, or kernels that this device has not
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnsupportedError(
            f"{type(model).__name__}: transformers cannot run it on plain text here: {reason}"
        ) from error
    lms = {mode: CausalLM(model, mode) for mode in MODES}
    errors = {mode: _error(lm, ids, whole) for mode, lm in lms.items() if lm.can(mode)}
    size = model.dtype.itemsize
    best = min((error for mode, error in errors.items() if mode != "recompute"), default=0.0)
    limit = min(TOLERANCE.get(size, 5e-2), 3 * best + FLOOR.get(size, 1e-2))
    for mode in MODES:
        if errors.get(mode, math.inf) <= limit:
            sizes = [nbytes(lms[mode].step(ids[:count], None, 1)[1]) for count in (8, 16)]
            growth = max(0, math.ceil((sizes[1] - sizes[0]) / 8))
            fixed = max(0, sizes[0] - 8 * growth)
            if fixed < growth:  # some bytes of bookkeeping: no state of its own
                growth, fixed = growth + math.ceil(fixed / _LEAST_BLOCK), 0
            return Probe(mode, whole.shape[1], growth, fixed)
    raise UnsupportedError(
        f"{type(model).__name__}: computing the same tokens again gives other logits, or tokens "
        "see those behind them; it cannot be run one token after another"
    )


def _error(lm: CausalLM, ids: list[int], whole: F32) -> float:
    """How far a sequence in chunks is from the whole one; infinite where it cannot go on."""
    memory: Any = None
    parts, start = [], 0
    for count in CHUNKS[lm.mode]:
        try:
            logits, memory = lm.step(ids[start : start + count], memory, count)
        except Exception:  # whatever a model does with a cache that it does not support
            return math.inf
        if memory is None:
            return math.inf
        parts.append(logits)
        start += count
    first = len(parts[0])
    distance = np.abs(np.concatenate(parts) - whole)
    # Apart, or many tokens that are right would hide a few that are not. The first chunk is wrong
    # where tokens see those behind them.
    error = max(distance[:first].mean(), distance[first:].mean())
    spread = np.abs(whole - whole.mean(axis=1, keepdims=True)).mean()
    return float(error / spread) if error < math.inf and spread > 0 else math.inf
