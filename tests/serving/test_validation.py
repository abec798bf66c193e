"""What is wrong is a 4xx that names the parameter and says why."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_process import ServerProcess

from sartor.serving.errors import ApiError
from sartor.serving.limits import ServerLimits
from sartor.serving.openai_types import (
    NEUTRAL,
    REFUSED,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
)
from sartor.serving.validation import parse

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
STREAM = CHAT | {"stream": True}
OBFUSCATION = "stream_options.include_obfuscation"
PROMPT: dict[str, Any] = {"prompt": "x"}
LIMITS = ServerLimits()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "audio": 3}]}, "messages[0].audio"),
        ({"messages": [{"role": "user", "content": "x", "refusal": "n"}]}, "messages[0].refusal"),
        ({"messages": [{"role": "user", **{f"x{i}": i for i in range(65)}}]}, "messages[0]"),
        (CHAT | {"age": 3}, "age"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls",
        ),
        (CHAT | {"temperature": 3}, "temperature"),
        (CHAT | {"temperature": "1"}, "temperature"),
        (CHAT | {"top_p": -0.1}, "top_p"),
        (CHAT | {"n": 0}, "n"),
        (CHAT | {"n": True}, "n"),
        (CHAT | {"max_tokens": 0}, "max_tokens"),
        (CHAT | {"max_tokens": 1.5}, "max_tokens"),
        (CHAT | {"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        (CHAT | {"seed": 2**64}, "seed"),
        (CHAT | {"stop": ["a"] * 17}, "stop"),
        (CHAT | {"stop": [""]}, "stop"),
        (CHAT | {"stop": ""}, "stop"),
        (CHAT | {"logit_bias": {"a": 1}}, "logit_bias"),
        (CHAT | {"logit_bias": {"5": 101}}, "logit_bias"),
        (CHAT | {"logit_bias": {"259": 1}}, "logit_bias"),
        (CHAT | {"stop_token_ids": [-1]}, "stop_token_ids"),
        (CHAT | {"top_logprobs": 3}, "top_logprobs"),
        (CHAT | {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT | {"stream_options": {"include_usage": True}}, "stream_options"),
        (STREAM | {"stream_options": {"include_obfuscation": True}}, OBFUSCATION),
        (STREAM | {"stream_options": {"include_obfuscation": 0.0}}, OBFUSCATION),
        (CHAT | {"tools": [{"type": "function"}]}, "tools"),
        (CHAT | {"response_format": {"type": "json_object"}}, "response_format"),
        (CHAT | {"chat_template_kwargs": {"messages": [], "self": 1}}, "chat_template_kwargs"),
        (CHAT | {"frobnicate": None}, "frobnicate"),
        (CHAT | {"messages": [{"role": "user", "content": "x" * 3000}]}, "messages"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [259]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": [1] * 2048}, "prompt"),
        ({"prompt": ["a"] * 1025}, "prompt"),
        (PROMPT | {"echo": True, "logprobs": 1}, "echo"),
        (PROMPT | {"suffix": "y"}, "suffix"),
        (PROMPT | {"best_of": 2}, "best_of"),
        (PROMPT | {"messages": []}, "messages"),
    ],
)
def test_wrong_parameters_are_named(
    api_server: ServerProcess, body: dict[str, Any], param: str
) -> None:
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    response = api_server.post(path, {"model": api_server.name, **body})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    assert param in error["message"] or "prompt" in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_long_prompt_names_both_numbers(api_server: ServerProcess) -> None:
    body = {"model": api_server.name, "prompt": "x" * 2500}
    error = api_server.post("/v1/completions", body).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "2500" in error["message"]
    assert "2048" in error["message"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "JSON"),
        (b"[]", "object"),
        (b'{"model": "\xff"}', "JSON"),
        (b'{"temperature": NaN}', "JSON"),
        (b'{"model": "m", "messages": [{"role": "user"}], "temperature": 1e999}', "temperature"),
        (b'{"model": "\\ud800"}', "JSON"),
        (b"[" * 100_000, "levels"),
        (b'{"model": "x", "seed": ' + b"9" * 5000 + b"}", "JSON"),
    ],
)
def test_bad_bodies_are_explained(api_server: ServerProcess, content: bytes, says: str) -> None:
    response = api_server.http.post("/v1/chat/completions", content=content)
    assert response.status_code == 400, response.text
    assert says in response.json()["error"]["message"]


def test_other_status_codes(api_server: ServerProcess) -> None:
    http, url = api_server.http, "/v1/completions"
    text = http.post(url, content=b"{}", headers={"content-type": "text/plain"})
    large = http.post(url, content=b" " * (8 * 2**20 + 1))
    chunked = http.post(url, content=(b" " * 2**20 for _ in range(9)))
    method = http.get(url)
    place = http.get("/v2")
    codes = [r.status_code for r in (text, large, chunked, method, place)]
    assert codes == [415, 413, 413, 405, 404]
    for response in (text, large, chunked, method, place):
        assert response.json()["error"]["message"]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_parameters(name: str) -> None:
    body = {"model": "m", **CHAT}
    with pytest.raises(ApiError) as error:
        parse(ChatRequest, json.dumps(body | {name: "something"}).encode(), LIMITS)
    assert (error.value.param, error.value.code) == (name, "unsupported")
    for value in (None, *NEUTRAL.get(name, ())):
        parse(ChatRequest, json.dumps(body | {name: value}).encode(), LIMITS)


@pytest.mark.parametrize(
    ("kind", "name", "meant"),
    [
        (ChatRequest, "temperatur", "temperature"),
        (ChatRequest, "Top_P", "top_p"),
        (ChatRequest, "repeat_penalty", "repetition_penalty"),
        (ChatRequest, "max_new_tokens", "max_tokens"),
        (CompletionRequest, "n_predict", "max_tokens"),
        (EmbeddingRequest, "inputs", "input"),
        (EmbeddingRequest, "max_new_tokens", ""),
        (ChatRequest, "frobnicate", ""),
    ],
)
def test_unknown_parameters_have_near_ones(kind: Any, name: str, meant: str) -> None:
    with pytest.raises(ApiError) as error:
        parse(kind, json.dumps({"model": "m", name: 1}).encode(), LIMITS)
    assert error.value.code == "unknown_parameter"
    hint = f"did you mean {meant!r}?" if meant else "remove it"
    assert error.value.message == f"the parameter {name!r} is unknown; {hint}"


def test_no_refused_parameter_is_honoured_too() -> None:
    honoured = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    assert not honoured & set(REFUSED)
    assert set(NEUTRAL) <= set(REFUSED)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, *REFUSED})


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6), st.booleans())
def test_anything_else_is_an_api_error_or_fine(body: dict[str, Any], chat: bool) -> None:
    kind = ChatRequest if chat else CompletionRequest
    with contextlib.suppress(ApiError):
        assert isinstance(parse(kind, json.dumps(body).encode(), LIMITS), kind)


@given(st.binary(max_size=60))
def test_any_bytes_are_an_api_error(body: bytes) -> None:
    with pytest.raises(ApiError) as error:
        parse(ChatRequest, body, LIMITS)
    assert error.value.status == 400
