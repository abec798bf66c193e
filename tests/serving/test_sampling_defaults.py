"""One rule over HTTP too: what the request says, else the preset, else the model, else 0.7 and 0.95."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_process import ServerProcess
from tiny_model import write_tiny_model

from sartor.engine.preset import Preset
from sartor.errors import UsageError
from sartor.graph import SamplingDefaults, SamplingParams
from sartor.models.config import VectorConfig
from sartor.plan import ExecutionPlan
from sartor.serving.errors import ApiError
from sartor.serving.frontend import ServedModel, open_served_model
from sartor.serving.intake_process import IntakeProcess
from sartor.serving.limits import ServerLimits
from sartor.serving.openai_types import ChatRequest, CompletionRequest, EmbeddingRequest
from sartor.serving.prepare import Prepared, View, find_model, prepare
from sartor.serving.startup import add_presets
from sartor.store import ModelStore

VIEW = View(ServerLimits())
USER = [{"role": "user", "content": "hi"}]
POET = Preset(
    "poet",
    system="Rhyme.",
    sampling=SamplingDefaults(temperature=1.5, origin="preset poet"),
    template={"mood": "sad"},
)
TEMPLATE = "{{ mood }}|{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with values of its own."""
    folder = tmp_path_factory.mktemp("own")
    sampling = {"temp": 0.5, "top_k": 20, "top_p": 7.0}
    return write_tiny_model(folder / "own.gguf", sampling=sampling, template=TEMPLATE)


@pytest.fixture
def models(own: Path) -> dict[str, ServedModel]:
    model = open_served_model("m", own, ExecutionPlan(backend="null"))
    model.presets = {"poet": POET}
    return {"m": model}


def ask(models: dict[str, ServedModel], **body: Any) -> Prepared[ChatRequest]:
    raw = json.dumps({"model": "m", "messages": USER, **body}).encode()
    return prepare(ChatRequest, raw, models, VIEW)


def values(params: SamplingParams) -> tuple[float | None, ...]:
    return params.temperature, params.top_p, params.top_k, params.repetition_penalty


def test_the_model_s_own_values_are_what_a_request_leaves_open(
    models: dict[str, ServedModel], tiny_model: Path
) -> None:
    assert values(ask(models).params) == (0.5, 0.95, 20, 1.0)
    assert values(ask(models, temperature=None, top_k=None).params) == (0.5, 0.95, 20, 1.0)
    assert values(ask(models, temperature=0, top_k=-1, top_p=1).params) == (0, 1, 0, 1)
    assert values(ask(models, top_k=0).params) == (0.5, 0.95, 0, 1)
    raw = b'{"model": "m", "prompt": "x"}'
    assert values(prepare(CompletionRequest, raw, models, VIEW).params) == (0.5, 0.95, 20, 1.0)
    plain = {"m": open_served_model("m", tiny_model, ExecutionPlan(backend="null"))}
    assert values(ask(plain).params) == (0.7, 0.95, 0, 1.0)
    assert models["m"].sampling.notes  # top_p is out of range, and no reason to refuse the model


def test_a_preset_comes_between_the_request_and_the_model(models: dict[str, ServedModel]) -> None:
    found = ask(models, model="poet")
    assert (found.name, found.model, found.adapter) == ("poet", "m", "")
    assert values(found.params) == (1.5, 0.95, 20, 1.0)
    assert values(ask(models, model="poet", temperature=0.1).params)[0] == 0.1
    text = models["m"].tokenizer.decode
    assert text(found.prompts[0]) == "sad|[system:Rhyme.][user:hi]"
    for role in ("system", "developer"):
        own_words = [{"role": role, "content": "Prose."}, *USER]
        prompt = ask(models, model="poet", messages=own_words).prompts[0]
        assert text(prompt) == "sad|[system:Prose.][user:hi]"
    prompt = ask(models, model="poet", chat_template_kwargs={"mood": "glad"}).prompts[0]
    assert text(prompt) == "glad|[system:Rhyme.][user:hi]"
    assert text(ask(models).prompts[0]) == "|[user:hi]"
    raw = b'{"model": "poet", "prompt": "x"}'
    completion = prepare(CompletionRequest, raw, models, VIEW)
    assert (completion.name, values(completion.params)) == ("poet", (1.5, 0.95, 20, 1.0))
    assert text(completion.prompts[0]) == "x"  # plain text has no place for a system prompt


def test_presets_are_names_like_others(models: dict[str, ServedModel]) -> None:
    with pytest.raises(ApiError, match="poet"):
        find_model(models, "other", VIEW)
    with pytest.raises(ApiError, match="text, not embeddings"):
        prepare(EmbeddingRequest, b'{"model": "poet", "input": "x"}', models, VIEW)
    only = View(ServerLimits(), frozenset({"poet"}))
    assert find_model(models, "poet", only).preset is POET
    with pytest.raises(ApiError):
        find_model(models, "m", only)
    with pytest.raises(ApiError):
        find_model(models, "poet", View(ServerLimits(), frozenset({"m"})))


def test_the_process_for_long_requests_knows_them(models: dict[str, ServedModel]) -> None:
    async def run() -> None:
        process = IntakeProcess(models)
        for name in ("m", "poet"):
            raw = json.dumps({"model": name, "messages": USER}).encode()
            assert await process.prepare(ChatRequest, raw, VIEW) == ask(models, model=name)
        await process.close()

    asyncio.run(run())


def test_presets_that_cannot_be_served_are_refused(
    models: dict[str, ServedModel], tmp_path: Path, own: Path
) -> None:
    models["m"].presets = {}
    store = ModelStore(tmp_path)

    def add(*presets: Preset) -> None:
        add_presets(models, presets, store)

    with pytest.raises(UsageError, match="name of a model"):
        add(Preset("m"))
    with pytest.raises(UsageError, match=f"for {own}; name that model too"):
        add(Preset("x", model=str(own)))
    add(POET)
    with pytest.raises(UsageError, match="name of a preset"):
        add(POET)
    models["m"].template = None
    with pytest.raises(UsageError, match="no chat template"):
        add(Preset("x", system="hi"))
    add(Preset("cool", sampling=SamplingDefaults(temperature=0.1)))
    models["n"] = models["m"]
    with pytest.raises(UsageError, match="names no model, and 2 are served"):
        add(Preset("y"))
    models["m"].vectors = VectorConfig()
    del models["n"]
    with pytest.raises(UsageError, match="makes vectors"):
        add(Preset("y"))


def test_a_server_lists_and_answers_them(
    own: Path, start_server: Callable[..., ServerProcess]
) -> None:
    preset = {"name": "poet", "model": str(own), "system": "Rhyme.", "sampling": {"temperature": 0}}
    server = start_server([own], presets=[preset])
    listed = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert [card["id"] for card in listed] == [own.name, "poet"]
    assert listed[1]["parent"] == own.name
    assert httpx.get(f"{server.url}/v1/models/poet").json() == listed[1]
    body = {"model": "poet", "messages": USER, "max_tokens": 3}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30).json()
    assert answer["model"] == "poet"
    with_system = len("|[system:Rhyme.][user:hi]")
    assert answer["usage"]["prompt_tokens"] == with_system
    long = [{"role": "user", "content": "x" * 100_000}]
    refused = httpx.post(
        f"{server.url}/v1/chat/completions", json=body | {"messages": long}, timeout=60
    )
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_the_description_says_the_rule(api_server: ServerProcess) -> None:
    schemas = httpx.get(f"{api_server.url}/openapi.json").json()["components"]["schemas"]
    for name, default in (("temperature", "0.7"), ("top_p", "0.95"), ("top_k", "0")):
        for kind in ("ChatRequest", "CompletionRequest"):
            told = schemas[kind]["properties"][name]["description"]
            assert "the model's own" in told
            assert told.endswith(f"else {default}.")
