"""Adapters over HTTP: named as models, loaded and dropped while requests run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from server_process import ServerProcess, kill_hard, wait_until
from tiny_adapter import write_tiny_adapter

PROMPT = "hello hello"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that clients may load, and next to the shelf one that they may not."""
    folder = tmp_path_factory.mktemp("adapters")
    write_tiny_adapter(folder / "shelf" / "one", 1)
    write_tiny_adapter(folder / "shelf" / "two", 2)
    write_tiny_adapter(folder / "shelf" / "wide", 3, width=48)
    write_tiny_adapter(folder / "hidden", 4)
    return folder / "shelf"


@pytest.fixture(scope="module")
def server(tiny_model: Path, shelf: Path) -> Iterator[ServerProcess]:
    with ServerProcess(
        [tiny_model],
        backend="reference",
        device="reference",
        adapters={"first": str(shelf / "one")},
        adapter_folder=str(shelf),
    ) as server:
        yield server


def _answer(server: ServerProcess, model: str, tokens: int = 12) -> str:
    answer = server.client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert answer.model == model
    return answer.choices[0].text


def _load(server: ServerProcess, name: str, path: str) -> int:
    return server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}).status_code


def _unload(server: ServerProcess, name: str) -> int:
    return server.post("/v1/unload_lora_adapter", {"lora_name": name}).status_code


def test_an_adapter_is_named_like_a_model(server: ServerProcess) -> None:
    assert _answer(server, "first") != _answer(server, server.name)
    cards = {card["id"]: card for card in server.http.get("/v1/models").json()["data"]}
    assert cards["first"]["parent"] == server.name
    assert server.http.get("/v1/models/first").json()["id"] == "first"


def test_adapters_come_and_go_while_the_server_runs(server: ServerProcess) -> None:
    assert _load(server, "second", "two") == 200
    answers = {model: _answer(server, model) for model in (server.name, "first", "second")}
    assert len(set(answers.values())) == 3
    together: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda m=m: together.update({m: _answer(server, m)}))
        for m in answers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == answers
    assert _unload(server, "second") == 200
    with pytest.raises(openai.NotFoundError, match=r"'second' is not served here.*first"):
        _answer(server, "second")
    # The same name for another adapter: nothing of the old one is left in the prefix cache.
    assert _load(server, "second", "one") == 200
    assert _answer(server, "second") == answers["first"]
    assert _unload(server, "second") == 200


def test_a_killed_worker_comes_back_with_its_adapters(server: ServerProcess) -> None:
    assert _load(server, "third", "two") == 200
    before = _answer(server, "third"), _answer(server, "first")
    kill_hard(server.worker())
    assert (_answer(server, "third"), _answer(server, "first")) == before
    assert _unload(server, "third") == 200


def test_requests_that_run_with_a_dropped_adapter_finish_also_after_a_crash(
    server: ServerProcess,
) -> None:
    assert _load(server, "leaving", "two") == 200
    whole = _answer(server, "leaving", 400)
    result: list[str] = []
    thread = threading.Thread(target=lambda: result.append(_answer(server, "leaving", 400)))
    thread.start()
    wait_until(lambda: server.health().status_code == 200)
    with server.client.completions.create(
        model="leaving",
        prompt=PROMPT,
        max_tokens=400,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    ) as stream:
        pieces = [next(stream).choices[0].text]
        assert _unload(server, "leaving") == 200
        assert _load(server, "leaving", "one") == 400  # its old self is still at work
        kill_hard(server.worker())
        pieces += [event.choices[0].text for event in stream if event.choices]
    thread.join()
    assert "".join(pieces) == whole
    assert result == [whole]
    wait_until(lambda: _load(server, "leaving", "one") == 200)
    assert _unload(server, "leaving") == 200


def test_what_cannot_be_loaded_is_refused_by_name(server: ServerProcess) -> None:
    for name, path, words in (
        ("first", "two", "'first' is in use"),
        (server.name, "two", "is in use"),
        ("x", "absent", "'absent' is no folder"),
        ("x", "../hidden", "'../hidden' is no folder in the server's adapter folder"),
        ("x", "tw\0o", "is no folder in the server's adapter folder"),
        ("x", "two/" * 1000, "is no folder in the server's adapter folder"),
        ("x", "wide", "do not fit a weight of [32, 32]"),
    ):
        body = {"lora_name": name, "lora_path": path}
        response = server.post("/v1/load_lora_adapter", body)
        assert response.status_code == 400, body
        assert words in response.json()["error"]["message"]
    assert _unload(server, "nobody") == 404
    assert _answer(server, server.name)


def test_without_a_folder_clients_load_nothing(tiny_model: Path, shelf: Path) -> None:
    with ServerProcess([tiny_model], backend="reference", device="reference") as server:
        response = server.post(
            "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": str(shelf / "one")}
        )
        assert response.status_code == 403
        assert "--adapter-folder" in response.json()["error"]["message"]
