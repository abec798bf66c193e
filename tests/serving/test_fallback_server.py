"""A model that only ``transformers`` knows, through the server."""

from __future__ import annotations

from pathlib import Path

import pytest
from server_process import ServerProcess

from fallback_models import greedy, write_model
from sartor.text.tokenizer import tokenizer_from_folder

PROMPTS = [[65, 66, 67], [90]]


def test_completions_equal_generate(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    model = write_model(folder, "gpt2")
    tokenizer = tokenizer_from_folder(folder)
    with ServerProcess([folder], backend="auto", device="auto") as server:
        answer = server.client.completions.create(
            model=server.name, prompt=PROMPTS, temperature=0, max_tokens=8
        )
    assert capfd.readouterr().err.count("note: GPT2LMHeadModel runs through transformers") == 1
    for choice, ids in zip(answer.choices, PROMPTS, strict=True):
        expected = greedy(model, ids, 8)
        assert choice.text == tokenizer.decode(expected)
