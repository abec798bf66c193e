"""What the servers of vLLM and llama.cpp are tested for, and what holds here as well.

The behaviours, not the code, are those of vLLM's ``tests/entrypoints/openai`` and llama.cpp's
``tools/server/tests/unit`` (November 2026). Where this server differs on purpose:

- Parameters that nobody knows are refused by name; vLLM ignores them.
- A model has to be named, and has to be served; llama.cpp answers whatever is named.
- The API lives below /v1 only, and a key comes as ``Authorization: Bearer`` only.
- Roles are those of the OpenAI API; vLLM hands any to the template.
- The prompt's own log probabilities (``echo`` with ``logprobs``, ``prompt_logprobs``), grammars and
  JSON schemas, beam search, ``min_tokens``, truncated prompts and continued messages are refused
  by name: they are not done yet.
"""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from server_process import ServerProcess
from tiny_adapter import write_tiny_adapter
from tiny_encoder import write_tiny_encoder

from sartor.serving import openai_responses as shapes

CHAT: list[Any] = [
    {"role": "system", "content": "you are a helpful assistant"},
    {"role": "user", "content": "what is 1+1?"},
]


@pytest.fixture(scope="module")
def peers_server(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("peers")
    with ServerProcess(
        [tiny_model], adapters={"poet": str(write_tiny_adapter(folder / "poet"))}
    ) as server:
        yield server


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = write_tiny_encoder(tmp_path_factory.mktemp("peers") / "bert")
    with ServerProcess([folder], backend="reference", device="reference") as server:
        yield server


@pytest.fixture(scope="module")
def client(peers_server: ServerProcess) -> OpenAI:
    return peers_server.client


@pytest.fixture(params=["base", "adapter"])
def model(request: pytest.FixtureRequest, peers_server: ServerProcess) -> str:
    return peers_server.name if request.param == "base" else "poet"


@pytest.mark.parametrize(
    ("logprobs", "top", "expected"),
    [(False, None, None), (True, 0, 0), (True, None, 0), (True, 5, 5)],
)
def test_logprobs_of_chats(
    client: OpenAI, model: str, logprobs: bool, top: int | None, expected: int | None
) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=CHAT,
        max_completion_tokens=5,
        logprobs=logprobs,
        top_logprobs=top,
        extra_body={"ignore_eos": True},
    )
    found = answer.choices[0].logprobs
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert found.content is not None
    assert len(found.content) == 5
    for entry in found.content:
        assert len(entry.top_logprobs) == expected
        assert -9999 <= entry.logprob <= 0
        assert entry.bytes is not None


def test_the_bytes_of_tokens_are_the_text(client: OpenAI, model: str) -> None:
    for stream in (False, True):
        body: dict[str, Any] = {
            "model": model,
            "messages": CHAT,
            "max_tokens": 12,
            "seed": 5,
            "logprobs": True,
        }
        answer = client.chat.completions.create(**body, stream=stream)
        parts = list(answer) if stream else [answer]
        text = "".join(
            (c.delta.content if stream else c.message.content) or ""
            for p in parts
            for c in p.choices
        )
        entries = [e for p in parts for c in p.choices if c.logprobs for e in c.logprobs.content]
        data = b"".join(bytes(entry.bytes) for entry in entries)
        assert data.decode("utf-8", "replace") == text


@pytest.mark.parametrize(("logprobs", "least", "most"), [(0, 1, 1), (5, 1, 6)])
def test_logprobs_of_completions_hold_the_chosen_token(
    client: OpenAI, model: str, logprobs: int, least: int, most: int
) -> None:
    answer = client.completions.create(
        model=model, prompt=[97] * 5, max_tokens=5, logprobs=logprobs, temperature=0
    )
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert len(found.tokens) == len(found.top_logprobs) == 5
    for token, value, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert least <= len(top) <= most
        assert top[token] >= value


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_too_many_logprobs_are_refused_and_the_server_lives(
    client: OpenAI, model: str, stream: bool, chat: bool
) -> None:
    create: Any = client.chat.completions.create if chat else client.completions.create
    many = (
        {"messages": CHAT, "logprobs": True, "top_logprobs": 21}
        if chat
        else {"prompt": "x", "logprobs": 21}
    )
    with pytest.raises(openai.BadRequestError):
        create(model=model, stream=stream, **many)
    assert client.chat.completions.create(model=model, messages=CHAT, max_tokens=2).choices


def test_a_conversation(client: OpenAI, model: str) -> None:
    messages = list(CHAT)
    counts = []
    for question in ("express your result in json", "again", "why?"):
        answer = client.chat.completions.create(
            model=model, messages=messages, max_completion_tokens=5, seed=1
        )
        assert answer.usage is not None
        counts.append(answer.usage.prompt_tokens)
        message = answer.choices[0].message
        assert message.role == "assistant"
        # As a client would do it, with every field that the answer had.
        messages += [message.model_dump(), {"role": "user", "content": question}]
    assert counts == sorted(set(counts))


def test_a_stream_of_a_chat(client: OpenAI, model: str) -> None:
    body: dict[str, Any] = {"model": model, "messages": CHAT, "max_tokens": 10, "temperature": 0}
    whole = client.chat.completions.create(**body)
    chunks = list(client.chat.completions.create(**body, stream=True))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert [c.delta.role for c in choices] == ["assistant"] + [None] * (len(choices) - 1)
    assert [c.finish_reason for c in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1].finish_reason == whole.choices[0].finish_reason
    assert "".join(c.delta.content or "" for c in choices) == whole.choices[0].message.content
    assert len({(c.id, c.model, c.created, c.system_fingerprint) for c in chunks}) == 1
    assert all(len(chunk.choices) == 1 for chunk in chunks)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    ("options", "running", "final"),
    [
        ({}, False, False),
        ({"include_usage": False}, False, False),
        ({"include_usage": False, "continuous_usage_stats": True}, False, False),
        ({"include_usage": True}, False, True),
        ({"include_usage": True, "continuous_usage_stats": False}, False, True),
        ({"include_usage": True, "continuous_usage_stats": True}, True, True),
    ],
)
def test_usage_in_streams(
    client: OpenAI, model: str, chat: bool, options: Any, running: bool, final: bool
) -> None:
    body: dict[str, Any] = {"model": model, "max_tokens": 8, "stream": True, "seed": 1}
    body |= {"stream_options": options, "extra_body": {"ignore_eos": True}}
    chunks = list(
        client.chat.completions.create(**body, messages=CHAT)
        if chat
        else client.completions.create(**body, prompt="x")
    )
    if final:
        last = chunks.pop()
        assert last.choices == []
        assert last.usage is not None
        assert last.usage.completion_tokens == 8
    counts = [chunk.usage and chunk.usage.completion_tokens for chunk in chunks]
    if not running:
        assert set(counts) == {None}
        return
    assert counts == sorted(counts)
    assert counts[-1] == 8
    for chunk in chunks:
        u = chunk.usage
        assert u.prompt_tokens + u.completion_tokens == u.total_tokens


@pytest.mark.parametrize(
    "options", [{"include_usage": None}, {"include_usage": True}, {"continuous_usage_stats": True}]
)
@pytest.mark.parametrize("chat", [False, True])
def test_options_of_streams_need_a_stream(
    client: OpenAI, model: str, chat: bool, options: Any
) -> None:
    create: Any = client.chat.completions.create if chat else client.completions.create
    asked = {"messages": CHAT} if chat else {"prompt": "x"}
    with pytest.raises(openai.BadRequestError) as error:
        create(model=model, stream_options=options, **asked)
    assert error.value.param == "stream_options"


def test_choices_end_at_different_times(client: OpenAI, model: str) -> None:
    body: dict[str, Any] = {
        "model": model,
        "prompt": "What is an LLM?",
        "n": 6,
        "max_tokens": 300,
        "seed": 42,
        "stop": ["e", "t"],
    }
    whole = client.completions.create(**body)
    assert [choice.index for choice in whole.choices] == list(range(6))
    texts = [choice.text for choice in whole.choices]
    assert len(set(texts)) == 6
    assert len({len(text) for text in texts}) > 1
    streamed: dict[int, str] = dict.fromkeys(range(6), "")
    ends = []
    for chunk in client.completions.create(**body, stream=True):
        (choice,) = chunk.choices
        assert choice.index not in ends, "nothing comes after a choice has ended"
        streamed[choice.index] += choice.text
        if choice.finish_reason is not None:
            ends.append(choice.index)
    assert sorted(ends) == list(range(6))
    assert list(streamed.values()) == texts


@pytest.mark.parametrize("prompts", [["Hello, my name is"] * 2, [[97] * 5] * 2])
@pytest.mark.parametrize("n", [1, 2])
def test_equal_prompts_in_one_request_have_equal_answers(
    client: OpenAI, model: str, prompts: Any, n: int
) -> None:
    answer = client.completions.create(model=model, prompt=prompts, n=n, max_tokens=5, seed=3)
    texts = [choice.text for choice in answer.choices]
    assert len(texts) == 2 * n
    assert texts[:n] == texts[n:]


def test_what_is_echoed(client: OpenAI, model: str) -> None:
    for prompt in ("Hello, my name is", [97, 98, 99]):
        answer = client.completions.create(model=model, prompt=prompt, echo=True, max_tokens=3)
        text = prompt if isinstance(prompt, str) else "abc"
        assert answer.choices[0].text.startswith(text)
        assert answer.choices[0].text != text


def test_a_bias_chooses_and_forbids(peers_server: ServerProcess) -> None:
    """The null backend has no logits; what counts here is that wrong ones are named."""
    for bias, says in (
        ({"999999": 1.0}, "999999"),
        ({"a": 1.0}, "logit_bias"),
        ({"1": 101.0}, "logit_bias"),
    ):
        response = peers_server.post(
            "/v1/chat/completions",
            {"model": peers_server.name, "messages": CHAT, "logit_bias": bias},
        )
        assert response.status_code == 400
        assert says in response.json()["error"]["message"]


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**63])
def test_a_long_seed(client: OpenAI, model: str, seed: int) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=model, messages=CHAT, seed=seed)
    assert error.value.param == "seed"


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "string",
        [123],
        [{}],
        [{"role": 123}],
        [{"role": "system", "content": 123}],
        [{"content": "hello"}],
        [{"role": "system", "content": "test"}, {}],
        [{"role": "my-custom-role", "content": "x"}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}],
    ],
)
def test_messages_that_are_none(peers_server: ServerProcess, messages: Any) -> None:
    response = peers_server.post(
        "/v1/chat/completions", {"model": peers_server.name, "messages": messages}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("messages")


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "42"}}},
        {"type": "sound"},
        {"type": "json_object", "schema": 123},
        5,
    ],
)
def test_formats_are_refused_not_ignored(peers_server: ServerProcess, response_format: Any) -> None:
    body = {"model": peers_server.name, "messages": CHAT, "response_format": response_format}
    response = peers_server.post("/v1/chat/completions", body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "response_format"


@pytest.mark.parametrize(
    "extra",
    [
        {"prompt_logprobs": 1},
        {"truncate_prompt_tokens": 4},
        {"return_token_ids": True},
        {"use_beam_search": True},
        {"min_tokens": 3},
        {"structured_outputs": {"regex": "[.*"}},
        {"guided_choice": ["a"]},
        {"grammar": 'root ::= "a"'},
        {"json_schema": {"const": "42"}},
        {"n_predict": 5},
        {"cache_prompt": True},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
        {"bad_words": ["x"]},
    ],
)
def test_extensions_of_peers_are_honoured_or_named(
    peers_server: ServerProcess, extra: dict[str, Any]
) -> None:
    body = {"model": peers_server.name, "messages": CHAT, **extra}
    response = peers_server.post("/v1/chat/completions", body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == next(iter(extra))


def test_neutral_values_of_what_is_refused_pass(peers_server: ServerProcess) -> None:
    body = {
        "model": peers_server.name,
        "messages": CHAT,
        "max_tokens": 1,
        "tool_choice": None,
        "min_tokens": 0,
        "response_format": {"type": "text"},
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop": None,
    }
    assert peers_server.post("/v1/chat/completions", body).status_code == 200


def test_the_wrong_content_type(client: OpenAI, model: str) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        client.chat.completions.create(
            model=model,
            messages=CHAT,
            extra_headers={"Content-Type": "application/x-www-form-urlencoded"},
        )
    assert error.value.status_code == 415


def test_many_clients_that_lose_patience_leave_nothing_behind(
    tiny_model: Path, start_server: Any
) -> None:
    """Without cancelling, the last request would wait for two million tokens."""
    server = start_server(device="null-4ms", max_requests=300)

    def make(timeout: float) -> AsyncOpenAI:
        return AsyncOpenAI(
            base_url=f"{server.url}/v1",
            api_key="x",
            max_retries=0,
            http_client=httpx.AsyncClient(
                verify=False, timeout=timeout, limits=httpx.Limits(max_connections=300)
            ),
        )

    async def run() -> None:
        impatient = make(2.0)
        body: dict[str, Any] = {"model": server.name, "messages": CHAT}
        lost = await asyncio.gather(
            *(
                impatient.chat.completions.create(
                    **body, max_tokens=2000, extra_body={"ignore_eos": True}
                )
                for _ in range(200)
            ),
            return_exceptions=True,
        )
        assert all(isinstance(error, openai.APITimeoutError) for error in lost), set(
            map(repr, lost)
        )
        answer = await make(10.0).chat.completions.create(
            **body, max_tokens=5, extra_body={"ignore_eos": True}
        )
        assert answer.usage.completion_tokens == 5
        await impatient.close()

    asyncio.run(run())


def test_aliases_and_adapters_are_models(client: OpenAI, peers_server: ServerProcess) -> None:
    assert [card.id for card in client.models.list().data] == [peers_server.name, "poet"]
    card = client.models.retrieve("poet")
    assert (card.id, card.object, card.parent) == ("poet", "model", peers_server.name)  # type: ignore[attr-defined]
    answer = client.chat.completions.create(model="poet", messages=CHAT, max_tokens=1)
    assert answer.model == "poet"


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("the cat", 1), ([4, 5, 6], 1), (["the cat", "dogs"], 2), ([[4], [5, 6]], 2)],
)
def test_embeddings_in_every_form(encoder: ServerProcess, prompt: Any, count: int) -> None:
    vectors = {}
    for form in ("float", "base64", None):
        body = {"model": encoder.name, "input": prompt}
        answer = encoder.post(
            "/v1/embeddings", body | ({} if form is None else {"encoding_format": form})
        )
        assert answer.status_code == 200
        parsed = shapes.EmbeddingList.model_validate(answer.json(), strict=True)
        assert [entry.index for entry in parsed.data] == list(range(count))
        assert parsed.usage.prompt_tokens == parsed.usage.total_tokens > 0
        vectors[form] = [
            list(struct.unpack(f"<{len(raw) // 4}f", raw))
            if isinstance(entry.embedding, str) and (raw := base64.b64decode(entry.embedding))
            else entry.embedding
            for entry in parsed.data
        ]
    for vector, encoded, default in zip(*vectors.values(), strict=True):
        assert vector == pytest.approx(encoded, abs=1e-5)
        assert vector == pytest.approx(default, abs=1e-5)
        assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "wrong",
    ["", [], [[]], {"content": "string"}, [12, "string"], ["string", [1]], "cat " * 600, None],
)
def test_embeddings_of_what_is_no_text(encoder: ServerProcess, wrong: Any) -> None:
    response = encoder.post("/v1/embeddings", {"model": encoder.name, "input": wrong})
    if wrong == "":  # [CLS] and [SEP] are tokens too
        assert response.status_code == 200
        return
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "input"


def test_equal_texts_have_equal_vectors(encoder: ServerProcess) -> None:
    body = {"model": encoder.name, "input": ["the cat sat"] * 5}
    data = encoder.post("/v1/embeddings", body).json()["data"]
    for entry in data:  # numpy's products differ a little with the number of rows
        assert entry["embedding"] == pytest.approx(data[0]["embedding"], abs=1e-5)


@pytest.mark.parametrize("chat", [False, True])
def test_answers_are_as_described(peers_server: ServerProcess, chat: bool) -> None:
    """Strictly: no field is missing, and none is there that the description does not have."""
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body: dict[str, Any] = {"model": peers_server.name, "max_tokens": 5, "n": 2}
    body |= (
        {"messages": CHAT, "logprobs": True, "top_logprobs": 2}
        if chat
        else {"prompt": "x", "logprobs": 2}
    )
    whole = shapes.ChatCompletion if chat else shapes.TextCompletion
    chunk = shapes.ChatCompletionChunk if chat else shapes.TextCompletionChunk
    whole.model_validate(peers_server.post(path, body).json(), strict=True)
    options = {"include_usage": True}
    stream = peers_server.post(path, body | {"stream": True, "stream_options": options}).text
    events = [line.removeprefix("data: ") for line in stream.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    for event in events:
        chunk.model_validate(json.loads(event), strict=True)
    for get, shape in (
        ("/health", shapes.Health),
        ("/v1/models", shapes.ModelList),
        ("/v1/models/poet", shapes.ModelCard),
        ("/v1/models/none", shapes.Error),
    ):
        shape.model_validate(peers_server.http.get(get).json(), strict=True)
