"""Perplexity of a model over a text, and its distance from a reference."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sartor import __version__
from sartor.engine.load import called
from sartor.evaluation.compare import (
    Comparison,
    compare,
    log_softmax,
    negative_log_likelihood,
    perplexity,
)
from sartor.evaluation.logits import F32, LogitSource, open_logits
from sartor.evaluation.text import evaluation_tokens, read_text
from sartor.plan import ExecutionPlan
from sartor.progress import SILENT, Progress, showing

TRANSFORMERS = "transformers"
"""The reference that runs the same checkpoint in fp32 with the library of that name."""


@dataclass(frozen=True)
class Quality:
    """What :func:`evaluate` measures; the last two only against a reference."""

    positions: int
    perplexity: float
    comparison: Comparison | None = None
    reference_perplexity: float | None = None


def evaluate(
    model: LogitSource,
    tokens: Sequence[int],
    reference: LogitSource | None = None,
    progress: Progress = SILENT,
) -> Quality:
    """Runs a text through a model, and a reference beside it, chunk by chunk.

    Perplexity is over the tokens after the first; KL and agreement over every position.
    UsageError where the vocabularies differ.
    """
    nll, reference_nll, parts = [], [], []
    at = 0
    beside = "" if reference is None else f" beside {called(reference.name)}"
    phase = f"evaluating {called(model.name)}{beside}"
    with showing(progress, phase, len(tokens), "tokens"):
        for found, wanted in _paired(model, tokens, reference):
            targets = tokens[at + 1 : at + 1 + len(found)]
            at += len(found)
            nll.append(_nll(found, targets))
            if wanted is not None:
                parts.append(compare(wanted, found))
                reference_nll.append(_nll(wanted, targets))
            progress.advance(len(found))
    if reference is None:
        return Quality(len(tokens), perplexity(np.concatenate(nll)))
    return Quality(
        len(tokens),
        perplexity(np.concatenate(nll)),
        Comparison.join(parts),
        perplexity(np.concatenate(reference_nll)),
    )


def _paired(
    model: LogitSource, tokens: Sequence[int], reference: LogitSource | None
) -> Iterator[tuple[F32, F32 | None]]:
    if reference is None:
        yield from ((found, None) for found in model.chunks(tokens))
    else:
        yield from zip(model.chunks(tokens), reference.chunks(tokens), strict=True)


def _nll(logits: F32, targets: Sequence[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    # The last position has no next token in the text.
    return negative_log_likelihood(log_softmax(logits[: len(targets)]), targets)


@dataclass(frozen=True)
class EvaluationReport:
    """The result of ``sartor eval``. KL is in nats, agreement a share from 0 to 1."""

    model: str
    text: str
    positions: int
    perplexity: float
    seconds: float
    bits_per_weight: float
    device: str
    isa: str
    activation: str
    head_bits: int
    kv: str
    version: str
    reference: str | None = None
    reference_perplexity: float | None = None
    mean_kl: float | None = None
    max_kl: float | None = None
    top_1_agreement: float | None = None

    def to_json_dict(self) -> dict[str, str | int | float]:
        """Flat; fields of the reference are there only where there was one."""
        return {name: value for name, value in vars(self).items() if value is not None}


def run_evaluation(
    path: Path,
    name: str,
    plan: ExecutionPlan,
    *,
    reference: Path | str | None = None,
    text: Path | None = None,
    positions: int = 512,
    cache: Path | None = None,
    progress: Progress = SILENT,
) -> EvaluationReport:
    """Evaluates a checkpoint over the first tokens of a text file, or of the bundled page.

    ``reference`` is the path of another checkpoint (run with fp32 activations and state, its
    head as it is; the same path measures what the plan's arithmetic costs), or ``"transformers"``.
    """
    model = open_logits(path, plan, name, cache, progress)
    other: LogitSource | None = None
    try:
        tokens = evaluation_tokens(model.loaded.tokenizer, read_text(text), positions)
        other = _open_reference(reference, path, plan, cache, progress)
        started = time.perf_counter()
        quality = evaluate(model, tokens, other, progress)
        seconds = time.perf_counter() - started
    finally:
        model.close()
        if other is not None:
            other.close()
    used = model.loaded.plan
    comparison = quality.comparison
    return EvaluationReport(
        model=name,
        text="english" if text is None else str(text),
        positions=quality.positions,
        perplexity=quality.perplexity,
        seconds=seconds,
        bits_per_weight=model.loaded.bits_per_weight,
        device=used.device,
        isa=used.isa,
        activation=used.activation,
        head_bits=used.head_bits,
        kv=used.kv,
        version=__version__,
        reference=None if other is None else other.name,
        reference_perplexity=quality.reference_perplexity,
        mean_kl=None if comparison is None else comparison.mean_kl,
        max_kl=None if comparison is None else comparison.max_kl,
        top_1_agreement=None if comparison is None else comparison.top_1_agreement,
    )


def _open_reference(
    reference: Path | str | None,
    path: Path,
    plan: ExecutionPlan,
    cache: Path | None,
    progress: Progress,
) -> LogitSource | None:
    if reference is None:
        return None
    if reference == TRANSFORMERS:
        from sartor.evaluation.transformers_reference import TransformersLogits

        with showing(progress, f"loading {path.name} with transformers"):
            return TransformersLogits(path)
    exact = plan.replace(activation="fp32", kv="fp32", head_bits=0)
    return open_logits(Path(reference), exact, str(reference), cache, progress)
