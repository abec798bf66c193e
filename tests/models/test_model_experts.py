"""Models with experts: logits against transformers on tiny random models in fp32."""

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
from tiny_experts import CASES, tiny
from tiny_models import expected_logits, save

from sartor.formats import open_checkpoint
from sartor.graph.passes import fuse
from sartor.models import Model, load_model
from sartor.ops import FUSED_OPERATORS

CHUNKINGS = {
    "whole": [LENGTH],
    "prompt-then-tokens": [PROMPT] + [1] * WRITTEN,
    "chunks": [9, 1, 13, 8],
}


class Saved:
    """A case, saved and loaded, and its logits by transformers."""

    def __init__(self, name: str, folder: Path) -> None:
        oracle = tiny(CASES[name])
        self.model: Model = load_model(open_checkpoint(save(oracle, folder)))
        self.logits = expected_logits(oracle, TOKENS, CHUNKINGS["prompt-then-tokens"])


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(request.param, tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("chunks", CHUNKINGS.values(), ids=CHUNKINGS)
def test_logits_equal_transformers(saved: Saved, backend: str, chunks: list[int]) -> None:
    found = run(saved.model, backend, TOKENS, chunks)
    assert relative_error(found, saved.logits) < TOLERANCE


def test_two_sequences_in_one_batch(saved: Saved, backend: str) -> None:
    """One sequence goes on while another begins; each gets its own logits."""
    program = saved.model.program
    executable = compiled(saved.model, backend)
    tables = [[0, 6, 3], [4, 1, 2]]
    first = step_batch(program, [(TOKENS[:PROMPT], 0)], tables[:1], LENGTH)
    executable.collect(executable.submit(first))
    both = step_batch(program, [(TOKENS[PROMPT:], PROMPT), (TOKENS, 0)], tables, LENGTH)
    logits = executable.collect(executable.submit(both)).taps[head_of(program)]
    assert relative_error(logits[:WRITTEN], saved.logits[PROMPT:]) < TOLERANCE
    assert relative_error(logits[WRITTEN:], saved.logits) < TOLERANCE


def test_fused_program_gives_equal_logits(saved: Saved) -> None:
    fused = fuse(saved.model.program, frozenset(FUSED_OPERATORS), frozenset({"lm_head"}))
    found = run(saved.model, "reference", TOKENS, [LENGTH], fused)
    assert np.array_equal(found, run(saved.model, "reference", TOKENS, [LENGTH]))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.plain])
def test_option_under_test_matters(name: str) -> None:
    """A case would fail if its option were ignored: without it the logits are others."""
    case = CASES[name]
    with_option = expected_logits(tiny(case), TOKENS, [LENGTH])
    without = expected_logits(tiny(case, case.plain), TOKENS, [LENGTH])
    assert relative_error(without, with_option) > 100 * TOLERANCE
