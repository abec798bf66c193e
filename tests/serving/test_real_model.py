"""The whole way with a real model on the CPU backend."""

from __future__ import annotations

from pathlib import Path

import pytest
from server_process import ServerProcess, kill_hard
from test_crash import Stream, say, wait_until


def test_smollm2_answers_and_survives(model_files: dict[str, Path]) -> None:
    pytest.importorskip("sartor.backends.cpu._native")
    with ServerProcess([model_files["smollm2-135m"]], backend="cpu", device="auto") as server:
        question = say("What is the capital of France? Answer in one word.")
        answer = server.client.chat.completions.create(
            model=server.name, messages=question, temperature=0, max_tokens=30
        )
        assert "Paris" in (answer.choices[0].message.content or "")
        assert answer.choices[0].finish_reason == "stop"
        story = {"messages": say("Tell me a story."), "seed": 1, "max_tokens": 60}
        undisturbed = Stream(server, **story).finish()
        stream = Stream(server, **story)
        wait_until(lambda: len(stream.pieces) > 10)
        kill_hard(server.worker())
        assert stream.finish() == undisturbed
