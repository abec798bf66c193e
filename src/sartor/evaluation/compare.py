"""How far two models are from each other and from a text; everything in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sartor.errors import UsageError

F64 = npt.NDArray[np.float64]
Logits = npt.NDArray[np.floating]
Flags = npt.NDArray[np.bool_]


def log_softmax(logits: Logits) -> F64:
    """Natural log probabilities of each row, ``[rows, vocab]``."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def kl_divergence(reference: F64, found: F64) -> F64:
    """``KL(reference || found)`` of each row, in nats, from log probabilities."""
    terms = np.zeros_like(reference)
    # Where the reference has no mass at all, 0 * log 0 counts as 0.
    np.subtract(reference, found, out=terms, where=~np.isneginf(reference))
    terms *= np.exp(reference)
    out: F64 = terms.sum(axis=-1)
    return out


def negative_log_likelihood(log_probabilities: F64, targets: Sequence[int]) -> F64:
    """``-log p(target)`` of each row, in nats."""
    out: F64 = -log_probabilities[np.arange(len(targets)), np.asarray(targets, np.int64)]
    return out


def perplexity(nll: F64) -> float:
    """The exponential of the mean negative log likelihood."""
    return float(np.exp(nll.mean()))


@dataclass(frozen=True)
class Comparison:
    """Two models over the same positions, one entry a position.

    kl        ``KL(reference || found)``, nats
    agreed    whether both have the same likeliest token
    """

    kl: F64
    agreed: Flags

    @property
    def mean_kl(self) -> float:
        return float(self.kl.mean())

    @property
    def max_kl(self) -> float:
        return float(self.kl.max())

    @property
    def top_1_agreement(self) -> float:
        """Share of positions, 0 to 1."""
        return float(self.agreed.mean())

    @staticmethod
    def join(parts: Sequence[Comparison]) -> Comparison:
        return Comparison(
            np.concatenate([part.kl for part in parts]),
            np.concatenate([part.agreed for part in parts]),
        )


def compare(reference: Logits, found: Logits) -> Comparison:
    """Compares logits ``[rows, vocab]``; ties of the likeliest token go to the lowest id."""
    if reference.shape != found.shape:
        raise UsageError(
            f"the reference gives logits of shape {list(reference.shape)}, the model "
            f"{list(found.shape)}; compare models of one vocabulary"
        )
    return Comparison(
        kl_divergence(log_softmax(reference), log_softmax(found)),
        reference.argmax(axis=-1) == found.argmax(axis=-1),
    )
