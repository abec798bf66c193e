"""The cost of rendering a chat in a process of its own."""

from __future__ import annotations

from pathlib import Path

import chat_template
import pytest
from tiny_model import write_tiny_model

SOURCE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def test_a_prompt_in_both_ways() -> None:
    result = chat_template.measure(SOURCE, 400, 5)
    assert result.prompt_chars == 400 + len("system: \nuser: \nassistant: \nuser: \n")
    assert 0 < result.here < 1
    assert result.here < result.process <= result.process_p99 < result.first < 60
    assert result.added == pytest.approx(result.process - result.here, abs=result.process)


def test_of_a_model_and_of_one_without_a_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_model(tmp_path / "tiny.gguf")
    chat_template.main([str(tmp_path / "tiny.gguf"), "--rounds", "3"])
    assert "on top" in capsys.readouterr().out
    write_tiny_model(tmp_path / "plain.gguf", template=None)
    with pytest.raises(SystemExit):
        chat_template.main([str(tmp_path / "plain.gguf")])
    assert "has no chat template" in capsys.readouterr().err
