"""Fields of messages that clients send back as they got them."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from server_process import ServerProcess

from sartor.plan import ExecutionPlan
from sartor.serving.frontend import open_served_model
from sartor.serving.ignored_fields import IgnoredFields
from sartor.serving.limits import ServerLimits
from sartor.serving.openai_types import ChatRequest
from sartor.serving.prepare import View, prepare

ECHOED: dict[str, Any] = {
    "id": "msg_1",
    "reasoning_content": "I think",
    "reasoning": {"deep": [1, {"a": None}]},
    "refusal": None,
    "audio": None,
    "function_call": None,
    "tool_calls": [],
    "annotations": [{"type": "url_citation"}],
    "created": 1700000000,
    "index": 0,
    "status": "completed",
    "model_config": {},
    "plain": 1,
}
KNOWN = ("refusal", "audio", "function_call", "tool_calls")


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": list(messages), "max_tokens": 2, "seed": 1, **more}


def test_they_change_nothing(tiny_model: Any) -> None:
    models = {"m": open_served_model("m", tiny_model, ExecutionPlan())}

    def prepared(*messages: dict[str, Any]) -> Any:
        return prepare(
            ChatRequest, json.dumps(chat(*messages)).encode(), models, View(ServerLimits())
        )

    asked = {"role": "user", "content": "hello"}
    parts = {"role": "user", "content": [{"type": "text", "text": "hello"}]}
    for bare in (asked, {"role": "assistant", "content": "hello"}):
        found = prepared({**bare, **ECHOED})
        assert found.prompts == prepared(bare).prompts
        assert found.ignored == ECHOED.keys() - set(KNOWN)
    marked = {"type": "text", "text": "hello", "annotations": [], "cache_control": {"type": "x"}}
    found = prepared({"role": "user", "content": [marked], "id": "a"})
    assert found.prompts == prepared(parts).prompts
    assert found.ignored == {"annotations", "cache_control", "id"}
    assert prepared(asked).ignored == frozenset()


def test_the_log_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    ignored = IgnoredFields()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            ignored.note({"id", "reasoning_content"})
            ignored.note({"a secret\n", "another one"})
        ignored.note(set())
    assert [record.getMessage() for record in caplog.records] == [
        "the field id of messages is unknown and ignored",
        "the field reasoning_content of messages is unknown and ignored",
        "the field (odd name) of messages is unknown and ignored",
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for index in range(10_000):
            ignored.note({f"x{index}"})
    assert len(caplog.records) == 97
    assert "further names will not be told" in caplog.records[-1].getMessage()
    assert len(ignored._told) == 100


def test_over_http_in_every_size(api_server: ServerProcess) -> None:
    """Small ones are prepared at once, others on a thread, long ones in a process."""
    for size in (1, 20_000, 200_000):
        message = {"role": "user", "content": "hello", **ECHOED, "odd": "b" * size}
        body = {**chat(message), "model": api_server.name}
        response = api_server.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
    refused = {**body, "messages": [{**message, "tool_calls": [{"id": "1"}]}]}
    response = api_server.post("/v1/chat/completions", refused)
    assert response.json()["error"]["param"] == "messages[0].tool_calls"
