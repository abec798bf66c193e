"""Logits of further architectures against transformers, on tiny random models in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from logits_runner import (
    LENGTH,
    PROMPT,
    TOKENS,
    TOLERANCE,
    WRITTEN,
    compiled,
    head_of,
    relative_error,
    run,
    step_batch,
)
from tiny_hybrids import DENSE_CASES, HYBRID_CASES
from tiny_models import Case, build, expected_logits, save

from sartor.formats import open_checkpoint
from sartor.graph import Program
from sartor.graph.passes import fuse
from sartor.models import Model, load_model
from sartor.ops import FUSED_OPERATORS

CASES = DENSE_CASES | HYBRID_CASES
CHUNKINGS = {
    "whole": [LENGTH],
    "prompt-then-tokens": [PROMPT] + [1] * WRITTEN,
    "chunks-then-tokens": [9, 1, 13] + [1] * WRITTEN,
}


class Tiny:
    """A case, saved, loaded, and its logits by transformers on the whole sequence at once.

    Ropes that depend on the length are fixed at admission in Sartor; transformers changes them
    while it writes, so only whole sequences compare.
    """

    def __init__(self, case: Case, folder: Path) -> None:
        oracle = build(case, {})
        self.model: Model = load_model(open_checkpoint(save(oracle, folder)))
        self.logits = expected_logits(oracle, TOKENS, [LENGTH])


@pytest.fixture(scope="module", params=CASES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(CASES[request.param], tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("chunks", CHUNKINGS.values(), ids=CHUNKINGS)
def test_logits_equal_transformers(tiny: Tiny, backend: str, chunks: list[int]) -> None:
    found = run(tiny.model, backend, TOKENS, chunks)
    assert relative_error(found, tiny.logits) < TOLERANCE


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.plain])
def test_option_under_test_matters(name: str) -> None:
    """A case would fail if its option were ignored: without it the logits are others."""
    case = CASES[name]
    with_option = expected_logits(build(case, {}), TOKENS, [LENGTH])
    without = expected_logits(build(case, case.plain), TOKENS, [LENGTH])
    assert relative_error(without, with_option) > 100 * TOLERANCE


def test_two_sequences_in_one_batch(tiny: Tiny, backend: str) -> None:
    """One sequence goes on while another begins; each gets its own logits."""
    program = tiny.model.program
    executable = compiled(tiny.model, backend)
    tables = [[0, 6, 3], [4, 1, 2]]
    first = step_batch(program, [(TOKENS[:PROMPT], 0)], tables[:1], LENGTH)
    executable.collect(executable.submit(first))
    both = step_batch(program, [(TOKENS[PROMPT:], PROMPT), (TOKENS, 0)], tables, LENGTH)
    logits = executable.collect(executable.submit(both)).taps[head_of(program)]
    assert relative_error(logits[:WRITTEN], tiny.logits[PROMPT:]) < TOLERANCE
    assert relative_error(logits[WRITTEN:], tiny.logits) < TOLERANCE


def test_fused_program_gives_equal_logits(tiny: Tiny) -> None:
    fused = fuse(tiny.model.program, frozenset(FUSED_OPERATORS), frozenset({"lm_head"}))
    assert len(fused.nodes) < len(tiny.model.program.nodes)
    found = run(tiny.model, "reference", TOKENS, [LENGTH], fused)
    assert np.array_equal(found, run(tiny.model, "reference", TOKENS, [LENGTH]))


def test_program_survives_serialisation(tiny: Tiny) -> None:
    program = tiny.model.program
    assert Program.from_json(program.to_json()) == program
