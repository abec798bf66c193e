"""Checks a model against ``transformers`` in fp32 on the same dequantised weights.

Runs the first positions of an English text through both, once for every pair of activation and
KV format, and holds the result to limits: with int8 activations at least 97 % of the likeliest
tokens agree and the mean KL is at most 0.01; with fp32 activations and KV 99.5 % and 1e-4.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from sartor.errors import SartorError
from sartor.evaluation.evaluate import evaluate
from sartor.evaluation.logits import open_logits
from sartor.evaluation.text import evaluation_tokens, read_text
from sartor.evaluation.transformers_reference import TransformersLogits
from sartor.plan import ActivationFormat, ExecutionPlan, KVFormat


@dataclass(frozen=True)
class Limits:
    """The least agreement (share) and the largest mean KL (nats)."""

    agreement: float
    kl: float


INT8 = Limits(0.97, 0.01)
EXACT = Limits(0.995, 1e-4)


def limits(activation: ActivationFormat, kv: KVFormat) -> Limits:
    """fp32 arithmetic on a 16-bit state is held to what int8 activations are held to."""
    return EXACT if activation == kv == "fp32" else INT8


@dataclass(frozen=True)
class Agreement:
    """What one plan reached, and whether that is within its limits."""

    activation: ActivationFormat
    kv: KVFormat
    positions: int
    top_1_agreement: float
    mean_kl: float
    max_kl: float
    perplexity: float
    reference_perplexity: float

    @property
    def within_limits(self) -> bool:
        least = limits(self.activation, self.kv)
        return self.top_1_agreement >= least.agreement and self.mean_kl <= least.kl


def measure(
    path: Path,
    reference: TransformersLogits,
    plan: ExecutionPlan,
    *,
    text: Path | None = None,
    positions: int = 512,
) -> Agreement:
    """One plan against the reference."""
    model = open_logits(path, plan, path.stem)
    try:
        tokens = evaluation_tokens(model.loaded.tokenizer, read_text(text), positions)
        quality = evaluate(model, tokens, reference)
    finally:
        model.close()
    assert quality.comparison is not None
    assert quality.reference_perplexity is not None
    return Agreement(
        activation=plan.activation,
        kv=plan.kv,
        positions=positions,
        top_1_agreement=quality.comparison.top_1_agreement,
        mean_kl=quality.comparison.mean_kl,
        max_kl=quality.comparison.max_kl,
        perplexity=quality.perplexity,
        reference_perplexity=quality.reference_perplexity,
    )


def _formats(known: tuple[str, ...], wanted: str) -> list[str]:
    names = wanted.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}; choose from {', '.join(known)}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 where every plan is within its limits, 1 where one is not."""
    parser = argparse.ArgumentParser(
        prog="python -m sartor.evaluation.against_transformers",
        description=__doc__,
        epilog="Needs torch, transformers and gguf (the extra 'test').",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    activations, kvs = get_args(ActivationFormat), get_args(KVFormat)
    parser.add_argument("model", type=Path, help="a .gguf file or a checkpoint folder")
    parser.add_argument("--positions", type=int, default=512, help="default 512")
    parser.add_argument("--text", type=Path, help="a UTF-8 text instead of the bundled page")
    parser.add_argument(
        "--activation",
        type=lambda value: _formats(activations, value),
        default=["int8", "fp32"],
        help=f"some of {','.join(activations)}; default int8,fp32",
    )
    parser.add_argument(
        "--kv",
        type=lambda value: _formats(kvs, value),
        default=["bf16", "fp32"],
        help=f"some of {','.join(kvs)}; default bf16,fp32",
    )
    parser.add_argument("--backend", default="auto", help="default auto")
    parser.add_argument("--isa", default="auto", help="CPU instruction-set path; default auto")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    options = parser.parse_args(arguments)
    results = []
    try:
        reference = TransformersLogits(options.model)
        for activation in cast(list[ActivationFormat], options.activation):
            for kv in cast(list[KVFormat], options.kv):
                plan = ExecutionPlan(
                    backend=options.backend, isa=options.isa, activation=activation, kv=kv
                )
                found = measure(
                    options.model,
                    reference,
                    plan,
                    text=options.text,
                    positions=options.positions,
                )
                results.append(found)
                if not options.json:
                    print(_line(found), flush=True)
    except SartorError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.json:
        rows = [vars(found) | {"within_limits": found.within_limits} for found in results]
        print(json.dumps({"model": str(options.model), "results": rows}))
    return 0 if all(found.within_limits for found in results) else 1


def _line(found: Agreement) -> str:
    verdict = "within limits" if found.within_limits else "LIMIT MISSED"
    return (
        f"{found.activation:>5} activations, {found.kv} state: top-1 "
        f"{found.top_1_agreement:.2%}, mean KL {found.mean_kl:.3g}, max KL {found.max_kl:.3g}, "
        f"perplexity {found.perplexity:.3f} (reference {found.reference_perplexity:.3f}): "
        f"{verdict}"
    )


if __name__ == "__main__":
    sys.exit(main())
