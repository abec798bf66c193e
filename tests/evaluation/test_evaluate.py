"""Evaluation from a checkpoint to a report, on a tiny model and on the real one."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from recorded import Recorded
from sartor.errors import SartorError, UsageError
from sartor.evaluation import against_transformers as against
from sartor.evaluation import (
    english_text,
    evaluate,
    evaluation_tokens,
    open_logits,
    run_evaluation,
)
from sartor.evaluation.compare import log_softmax
from sartor.evaluation.logits import ROWS
from sartor.evaluation.transformers_reference import TransformersLogits
from sartor.plan import ExecutionPlan

EXACT = ExecutionPlan(backend="reference", activation="fp32", kv="fp32")
POSITIONS = 2 * ROWS + 9  # the last chunk is a short one


def native(**fields: str) -> ExecutionPlan:
    if importlib.util.find_spec("sartor.backends.cpu._native") is None:
        pytest.skip("the native CPU backend is not built")
    return ExecutionPlan(backend="cpu").replace(**fields)


def logits(path: Path, plan: ExecutionPlan, tokens: tuple[int, ...]) -> np.ndarray:
    model = open_logits(path, plan, "tiny")
    return np.concatenate([chunk.copy() for chunk in model.chunks(tokens)])


@pytest.fixture(scope="module")
def tokens(tiny_path: Path) -> tuple[int, ...]:
    model = open_logits(tiny_path, EXACT, "tiny")
    return evaluation_tokens(model.loaded.tokenizer, english_text(), POSITIONS)


def test_logits_of_every_position_equal_transformers(
    tiny_path: Path, tokens: tuple[int, ...]
) -> None:
    expected = np.concatenate(list(TransformersLogits(tiny_path).chunks(tokens)))
    for plan in (EXACT, native(activation="fp32", kv="fp32")):
        found = logits(tiny_path, plan, tokens)
        assert found.shape == (POSITIONS, 259)
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_how_far_it_is(tiny_path: Path) -> None:
    progress = Recorded()
    run_evaluation(
        tiny_path, "tiny", EXACT, reference=tiny_path, positions=POSITIONS, progress=progress
    )
    names = [told.name for told in progress.phases if told.name.startswith("loading")]
    assert names == ["loading tiny", f"loading {tiny_path.name}"]
    told = progress.phase(f"evaluating tiny beside {tiny_path.name}")
    assert told.done == told.total == POSITIONS
    assert told.unit == "tokens"


def test_evaluation_equals_its_definition(tiny_path: Path, tokens: tuple[int, ...]) -> None:
    model = open_logits(tiny_path, EXACT, "tiny")
    quality = evaluate(model, tokens)
    assert quality.comparison is None
    table = log_softmax(logits(tiny_path, EXACT, tokens))
    expected = np.exp(-np.mean([table[i, t] for i, t in enumerate(tokens[1:])]))
    assert quality.perplexity == pytest.approx(expected)
    assert quality.positions == POSITIONS


def test_positions_at_the_edge_of_a_chunk(tiny_path: Path, tokens: tuple[int, ...]) -> None:
    """The last chunk may hold a single row, which has no next token."""
    for count in (2, ROWS, ROWS + 1):
        quality = evaluate(open_logits(tiny_path, EXACT, "tiny"), tokens[:count])
        table = log_softmax(logits(tiny_path, EXACT, tokens[:count]))
        nll = [-table[i, t] for i, t in enumerate(tokens[1:count])]
        assert quality.perplexity == pytest.approx(np.exp(np.mean(nll)))


def test_report_of_a_model_against_itself(tiny_path: Path) -> None:
    report = run_evaluation(
        tiny_path, "tiny", EXACT, reference=tiny_path, positions=POSITIONS
    ).to_json_dict()
    assert report["mean_kl"] == report["max_kl"] == 0
    assert report["top_1_agreement"] == 1
    assert report["perplexity"] == report["reference_perplexity"]
    assert report["model"] == "tiny"
    assert report["positions"] == POSITIONS
    assert json.loads(json.dumps(report)) == report


def test_report_without_a_reference_has_no_fields_of_one(tiny_path: Path) -> None:
    report = run_evaluation(tiny_path, "tiny", native(), positions=POSITIONS).to_json_dict()
    assert {"perplexity", "bits_per_weight", "activation", "kv", "isa"} < set(report)
    assert not {"reference", "mean_kl", "top_1_agreement"} & set(report)


def test_int8_activations_are_near_but_not_equal(tiny_path: Path) -> None:
    plan = native(activation="int8")
    report = run_evaluation(tiny_path, "tiny", plan, reference=tiny_path, positions=POSITIONS)
    assert report.mean_kl is not None
    assert 0 < report.mean_kl < 0.01


def test_text_of_a_file(tiny_path: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("aaaa" * 10, encoding="utf-8")
    report = run_evaluation(tiny_path, "tiny", EXACT, text=text, positions=40)
    assert report.text == str(text)
    with pytest.raises(UsageError, match="40 tokens, but 41 positions"):
        run_evaluation(tiny_path, "tiny", EXACT, text=text, positions=41)
    with pytest.raises(UsageError, match="cannot be read"):
        run_evaluation(tiny_path, "tiny", EXACT, text=tmp_path / "none.txt")


def test_more_positions_than_context(tiny_path: Path) -> None:
    plan = EXACT.replace(max_context=50)
    with pytest.raises(UsageError, match=r"60 positions.*50 tokens"):
        run_evaluation(tiny_path, "tiny", plan, positions=60)


def test_bundled_text_is_long_enough() -> None:
    assert len(english_text().split()) >= 700


def test_command_reports_json_and_limits(
    tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny_path), "--positions", "40", "--json", "--backend", "reference"]
    code = against.main([*arguments, "--activation", "fp32", "--kv", "fp32"])
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert code == 0
    assert row["within_limits"]
    assert row["top_1_agreement"] == 1


def test_command_exits_1_where_a_limit_is_missed(
    tiny_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(against, "EXACT", against.Limits(1.1, 0))
    arguments = [str(tiny_path), "--positions", "40", "--backend", "reference"]
    assert against.main([*arguments, "--activation", "fp32", "--kv", "fp32"]) == 1
    assert "LIMIT MISSED" in capsys.readouterr().out


def test_command_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        against.main([str(tmp_path), "--kv", "int3"])
    assert exit_.value.code == 2
    assert "choose from bf16" in capsys.readouterr().err


def test_reference_names_what_it_cannot_read(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(SartorError, match="mamba"):
        TransformersLogits(tmp_path / "other.gguf")


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Where cores are shared, torch's threads spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_torch_thread")
def test_smollm2_agrees_with_transformers(model_files: dict[str, Path]) -> None:
    """The real model, an independent reader and independent arithmetic."""
    path = model_files["smollm2-135m"]
    reference = TransformersLogits(path)
    exact = against.measure(path, reference, native(activation="fp32", kv="fp32"), positions=128)
    assert exact.top_1_agreement == 1
    assert exact.mean_kl < 1e-8
    assert exact.perplexity == pytest.approx(exact.reference_perplexity, rel=1e-5)
    fast = against.measure(path, reference, native(activation="int8", kv="bf16"), positions=512)
    assert fast.mean_kl < against.INT8.kl
    assert fast.top_1_agreement > against.INT8.agreement
