"""Logits against transformers, an independent implementation, on tiny random models in fp32."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from cases import CASES
from config_changes import Folders, load
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
from tiny_models import build, expected_logits, save

from sartor.graph import Program
from sartor.graph.passes import fuse
from sartor.models import Model
from sartor.ops import FUSED_OPERATORS

CHUNKINGS = {
    "whole": [LENGTH],
    "prompt-then-tokens": [PROMPT] + [1] * WRITTEN,
    "chunks-then-tokens": [9, 1, PROMPT - 10, WRITTEN - 4] + [1] * 4,
}


class Tiny:
    """A case, saved, loaded, and its logits by transformers."""

    def __init__(self, name: str, folder: Path, shards: str = "1GB") -> None:
        oracle = build(CASES[name], {})
        self.model: Model = load(save(oracle, folder, shards))
        # A rope that depends on the length: transformers changes it while it writes, Sartor
        # fixes it at admission; both agree on a sequence that is fed whole.
        dynamic = any(rope.depends_on_length for rope in self.model.program.ropes)
        self.logits = expected_logits(
            oracle, TOKENS, CHUNKINGS["whole" if dynamic else "prompt-then-tokens"]
        )


@pytest.fixture(scope="module", params=CASES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(request.param, tmp_path_factory.mktemp("tiny"))


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


def test_fused_program_gives_equal_logits(tiny: Tiny) -> None:
    fused = fuse(tiny.model.program, frozenset(FUSED_OPERATORS), frozenset({"lm_head"}))
    assert len(fused.nodes) < len(tiny.model.program.nodes)
    found = run(tiny.model, "reference", TOKENS, [LENGTH], fused)
    assert np.array_equal(found, run(tiny.model, "reference", TOKENS, [LENGTH]))


def test_program_survives_serialisation(tiny: Tiny) -> None:
    program = tiny.model.program
    assert Program.from_json(program.to_json()) == program


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


def test_sharded_checkpoint(tmp_path: Path) -> None:
    tiny = Tiny("qwen2-tied", tmp_path, shards="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert relative_error(run(tiny.model, "reference", TOKENS, [LENGTH]), tiny.logits) < TOLERANCE


def test_windows_and_ropes_of_gemma3_layers(folders: Folders) -> None:
    config = load(folders["gemma3-linear-softcap"]).config
    assert [layer.window for layer in config.layers] == [5, 5, 5, 5, 5, 0, 5]
    assert {(part.rope.kind, part.rope.theta) for part in config.layers if not part.window} == {
        ("linear", 1e6)
    }
    assert {(part.rope.kind, part.rope.theta) for part in config.layers if part.window} == {
        ("default", 1e4)
    }


@pytest.mark.parametrize("tiny", tiny_models.CASES, indirect=True)
def test_program_names_weights_as_the_checkpoint_does(tiny: Tiny) -> None:
    names = {spec.name for spec in tiny.model.program.weights}
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert ("lm_head.weight" in names) != tiny.model.config.tied_head
    weight = tiny.model.source.weight("model.norm.weight")
    assert weight.name == "model.norm.weight"
    for name in names:
        assert tiny.model.source.format(name) == tiny.model.source.weight(name).format
    assert dataclasses.is_dataclass(tiny.model)
