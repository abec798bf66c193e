"""What is wrong with a checkpoint, or assumed of it, and does not keep it from running."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_cli_commands import Capture, run, run_json
from tiny_model import write_tiny_model

from sartor import LLM, SamplingParams
from sartor.errors import UsageError

NOTE = "the model cannot chat: the chat template has a syntax error in line 2"


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "broken.gguf"
    return write_tiny_model(path, template="{{ bos_token }}\n{% for %}")


def test_a_broken_template_keeps_nobody_from_plain_prompts(capsys: Capture, broken: Path) -> None:
    code, out, err = run(capsys, "run", broken, "hello", "--raw", "--max-tokens", 4)
    assert (code, bool(out)) == (0, True)
    assert f"note: {NOTE}" in err
    code, out, err = run(capsys, "run", broken, "hello")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"error: {broken}: {NOTE}")
    assert err.splitlines()[-1].endswith("; --raw continues a PROMPT")


def test_from_python(broken: Path) -> None:
    with pytest.warns(UserWarning, match=NOTE):
        llm = LLM(str(broken))
    with llm:
        assert llm.generate(["hello"], SamplingParams(max_tokens=3))[0].text
        with pytest.raises(UsageError, match=NOTE):
            llm.chat([{"role": "user", "content": "hello"}])


def test_show_says_it_without_loading(capsys: Capture, broken: Path, tiny: Path) -> None:
    assert [note[: len(NOTE)] for note in run_json(capsys, "show", broken)["notes"]] == [NOTE]
    assert run_json(capsys, "show", tiny)["notes"] == []
    code, out, _ = run(capsys, "show", broken)
    assert code == 0
    assert NOTE in " ".join(out.split())
