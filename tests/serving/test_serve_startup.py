"""How a server begins: what ends it at once, further names of models, and the call to try."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from server_process import ServerProcess, wait_until
from tiny_adapter import write_tiny_adapter
from tiny_encoder import write_tiny_encoder
from tiny_model import write_tiny_model

from sartor.errors import SartorError, UsageError
from sartor.plan import ExecutionPlan
from sartor.serving.frontend import ServedModel, open_served_model
from sartor.serving.keys import ApiKey, add_key
from sartor.serving.limits import ServerLimits
from sartor.serving.messages import AdapterSpec
from sartor.serving.server import serve
from sartor.serving.startup import Started, add_adapters, add_aliases
from sartor.store.store import ModelStore

Start = Callable[..., ServerProcess]


class NoStore(ModelStore):
    """Nothing is looked for, since something else is wrong."""

    def ensure(self, *_: object, **__: object) -> Any:
        raise AssertionError("a model was loaded")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"port": 70000}, "port 70000 is out of range"),
        ({"host": "nowhere.invalid"}, "nowhere.invalid"),
        ({"keys": Path("/nowhere/keys.toml")}, "/nowhere/keys.toml"),
        ({"adapters": {"a": Path("/nowhere/a")}}, "/nowhere/a"),
        ({"adapter_folder": Path("/nowhere/all")}, "/nowhere/all"),
        ({"cors_origins": ["https://ok.example", "example.org"]}, "'example.org' is no origin"),
        ({"cors_origins": ["https://example.org/"]}, "is no origin"),
        ({"cors_origins": ["null"]}, "is no origin"),
        ({"max_wait": float("nan")}, "max_wait is nan"),
        ({"max_wait": float("inf")}, "max_wait is inf"),
    ],
)
def test_what_needs_no_model_is_checked_before_there_is_one(
    options: dict[str, Any], says: str
) -> None:
    with pytest.raises(SartorError, match=says):
        serve(["m"], store=NoStore(), **{"port": 0, **options})


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"request_seconds": float("inf")}, "0 sets no limit"),
        ({"request_seconds": float("nan")}, "request_seconds is nan"),
        ({"body_seconds": float("inf")}, "body_seconds is inf"),
    ],
)
def test_limits_that_are_none(limits: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ServerLimits(**limits)


def start_that_fails(models: list[Path], **options: Any) -> str:
    """What a server says on standard error that ends with status 1 by itself."""
    server = ServerProcess(models, wait=False, **options)
    try:
        out, err = server.process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        server.process.kill()
        raise
    assert server.process.returncode == 1
    assert out == ""
    return str(err)


def test_a_model_that_cannot_be_loaded_ends_the_server(tiny_model: Path) -> None:
    said = start_that_fails([tiny_model], plan={"state_bytes": 1})
    loading, error = said.splitlines()
    assert loading == f"Loading {tiny_model.name} ..."
    assert error.startswith("error: the server cannot start: ")
    assert "state_bytes" in error
    assert error.count(tiny_model.name) == 1


def test_too_little_memory_ends_the_server_with_one_line(tiny_model: Path) -> None:
    said = start_that_fails([tiny_model], backend="cpu", device="cpu", memory_bytes=20 << 20)
    assert len(said.splitlines()) == 2
    assert "memory limit of 21 MB" in said


def test_one_of_two_that_cannot_be_loaded_ends_the_server(tiny_model: Path, tmp_path: Path) -> None:
    encoder = write_tiny_encoder(tmp_path / "bert")  # which has no state
    said = start_that_fails([encoder, tiny_model], plan={"state_bytes": 1})
    assert len(said.splitlines()) == 2
    assert f"the model {tiny_model.name}: " in said
    assert f"the model {encoder.name}" not in said


def test_an_adapter_that_cannot_be_loaded_ends_the_server(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = start_that_fails([tiny_model], adapters={"poet": str(tmp_path / "empty")})
    assert len(said.splitlines()) == 2
    assert "the adapter poet: " in said


def test_a_worker_that_crashes_at_its_start_is_tried_again(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Nobody knows whether that would end the same way, so the server has its tries; the reason
    is not told three times."""
    broken = tmp_path / "sitecustomize.py"
    broken.write_text("import os, sys\nif 'sartor.serving.worker' in sys.orig_argv: os._exit(7)\n")
    said = start_that_fails([tiny_model], environment={"PYTHONPATH": str(tmp_path)})
    told = [line for line in said.splitlines() if "exit status 7" in line]
    assert told == [
        "the worker is gone: the worker ended with exit status 7",
        "error: the server cannot start: the worker ended with exit status 7",
    ]


@pytest.fixture
def served(tiny_model: Path, tmp_path: Path) -> dict[str, ServedModel]:
    encoder = write_tiny_encoder(tmp_path / "bert")
    models = {
        "text": open_served_model("text", tiny_model, ExecutionPlan()),
        "vectors": open_served_model("vectors", encoder, ExecutionPlan()),
    }
    models["text"].aliases = frozenset({"./typed"})
    models["text"].adapters["poet"] = AdapterSpec("poet", "p")
    return models


@pytest.mark.parametrize(
    ("aliases", "says"),
    [
        ({"a": "none"}, "none, which is not served; name one of text, vectors"),
        ({"a": "poet"}, "poet, which is an adapter"),
        ({"text": "vectors"}, "is a name of text already"),
        ({"text": "text"}, "is a name of text already"),
        ({"./typed": "vectors"}, "is a name of text already"),
        ({"poet": "text"}, "is a name of poet already"),
        ({"a\nb": "text"}, "is no name"),
        ({"a" * 257: "text"}, "is no name"),
    ],
)
def test_aliases_that_are_none(
    served: dict[str, ServedModel], aliases: dict[str, str], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        add_aliases(served, aliases)


def test_an_alias_is_taken_for_adapters_too(served: dict[str, ServedModel], tmp_path: Path) -> None:
    add_aliases(served, {"gpt": "./typed"})
    del served["vectors"]
    for name in ("gpt", "text", "./typed", "poet"):
        with pytest.raises(UsageError, match="rename"):
            add_adapters(served, {name: tmp_path})


def test_aliases_over_http(tiny_model: Path, tmp_path: Path, start_server: Start) -> None:
    keys = tmp_path / "keys.toml"
    every = add_key(keys, lambda sha: ApiKey(name="every", sha256=sha, admin=True))
    narrow = add_key(keys, lambda sha: ApiKey(name="n", sha256=sha, models=("gpt-4o",)))
    write_tiny_adapter(tmp_path / "all" / "a")
    encoder = write_tiny_encoder(tmp_path / "bert")
    server = start_server(
        [tiny_model, encoder],
        backend="reference",
        device="reference",
        keys=str(keys),
        adapter_folder=str(tmp_path / "all"),
        aliases={"gpt-4o": str(tiny_model), "ada": str(encoder)},
    )

    def post(path: str, key: str = every, **body: Any) -> Any:
        return server.http.post(path, json=body, headers={"Authorization": f"Bearer {key}"})

    def names(key: str) -> list[str]:
        headers = {"Authorization": f"Bearer {key}"}
        return [c["id"] for c in server.http.get("/v1/models", headers=headers).json()["data"]]

    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "seed": 1}
    asked, real = (post("/v1/chat/completions", model=m, **chat) for m in ("gpt-4o", server.name))
    assert asked.json()["model"] == "gpt-4o"  # as it was asked for
    assert asked.json()["choices"] == real.json()["choices"]
    streamed = post("/v1/chat/completions", model="gpt-4o", stream=True, **chat).text
    assert '"model":"gpt-4o"' in streamed
    long = {"metadata": {"a": "b" * 200_000}}  # prepared in a process of its own
    answer = post("/v1/completions", model="gpt-4o", prompt="x", max_tokens=1, **long)
    assert answer.json()["model"] == "gpt-4o"
    answer = post("/v1/embeddings", model="ada", input="x")
    assert answer.json()["model"] == "ada"

    assert names(every) == [server.name, "gpt-4o", encoder.name, "ada"]
    headers = {"Authorization": f"Bearer {every}"}
    card = server.http.get("/v1/models/gpt-4o", headers=headers).json()
    assert (card["id"], card["root"], "parent" in card) == ("gpt-4o", server.name, False)
    missing = post("/v1/completions", model="none", prompt="x").json()["error"]["message"]
    assert "gpt-4o" in missing

    # A key names what it may ask for, each name by itself.
    assert names(narrow) == ["gpt-4o"]
    assert post("/v1/completions", narrow, model="gpt-4o", prompt="x").status_code == 200
    assert post("/v1/completions", narrow, model=server.name, prompt="x").status_code == 404

    taken = {"lora_name": "gpt-4o", "lora_path": "a", "base_model_name": server.name}
    answer = post("/v1/load_lora_adapter", **taken)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora_name")

    metrics = server.http.get("/metrics", headers=headers).text
    assert f'model="{server.name}"' in metrics
    assert "gpt-4o" not in metrics


def started(model: ServedModel, **more: Any) -> Started:
    return Started(("http://[::1]:80",), (model,), {}, **more)


def test_the_call_to_try(served: dict[str, ServedModel], tmp_path: Path) -> None:
    text, vectors = served.values()
    assert started(text).example() == (
        "curl 'http://[::1]:80/v1/chat/completions' -H 'Content-Type: application/json' -d "
        '\'{"model": "text", "messages": [{"role": "user", "content": "Hello"}]}\''
    )
    assert "/v1/embeddings" in started(vectors).example()
    assert "-H 'Authorization: Bearer YOUR_KEY'" in started(vectors, keys=1).example()
    text.listed = ("gpt-4o",)
    assert '"model": "gpt-4o"' in started(text).example()
    bare = write_tiny_model(tmp_path / "bare.gguf", template=None)
    base = started(open_served_model('it\'s a "base"', bare, ExecutionPlan())).example()
    assert "/v1/completions" in base


@pytest.mark.parametrize("what", ["chat", "base", "vectors", "keys"])
def test_the_call_works_as_it_is_printed(what: str, tmp_path: Path, start_server: Start) -> None:
    options: dict[str, Any] = {}
    if what == "vectors":
        model = write_tiny_encoder(tmp_path / "it's a model")
        options = {"backend": "reference", "device": "reference"}
    else:
        template = {"template": None} if what == "base" else {}
        model = write_tiny_model(tmp_path / "it's a $(model).gguf", **template)
    token = ""
    if what == "keys":
        keys = tmp_path / "keys.toml"
        token = add_key(keys, lambda sha: ApiKey(name="a", sha256=sha))
        options["keys"] = str(keys)
    server = start_server([model], **options)
    opened = open_served_model(server.name, model, ExecutionPlan())
    call = Started((server.url,), (opened,), {}, keys=1 if token else None).example()
    done = subprocess.run(
        ["sh", "-c", call.replace("YOUR_KEY", token)], capture_output=True, text=True, timeout=60
    )
    answer = json.loads(done.stdout)
    assert answer.get("data" if what == "vectors" else "choices"), answer


def test_a_model_that_is_lost_later_is_told(start_server: Start, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf")
    other = write_tiny_model(tmp_path / "other.gguf")
    server = start_server([model, other])
    other.write_bytes(b"GGUF, and no more of it")
    server.worker().kill()
    wait_until(lambda: "it could not be loaded" in server.health().text, 30)
    body = {"model": str(model), "prompt": "x", "max_tokens": 1}
    assert server.post("/v1/completions", body).status_code == 200
    assert server.post("/v1/completions", {**body, "model": str(other)}).status_code == 503
