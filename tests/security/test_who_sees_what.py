"""What of a server is shown to whom: figures, problems, names, folders."""

from __future__ import annotations

import ipaddress
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from keyed_server import KeyedServer
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families
from raw_client import RawClient
from server_process import ServerProcess, wait_until
from tiny_model import write_tiny_model

from sartor.cli.main import guarded
from sartor.errors import UsageError
from sartor.serving.addresses import bind
from sartor.serving.hosts import Hosts, check_hosts
from sartor.serving.keys import ApiKey, add_key, read_keys
from sartor.serving.shown_paths import served_names_of, without_folders

Start = Callable[..., ServerProcess]
KEYS: dict[str, dict[str, Any]] = {
    "alice": {},
    "bob": {},
    "watcher": {"metrics": True},
    "boss": {"admin": True},
    "narrow": {"models": ("another",)},
}


class Guarded:
    def __init__(self, server: ServerProcess, folder: Path, tokens: dict[str, str]) -> None:
        self.server, self.folder, self.tokens = server, folder, tokens

    def get(self, path: str, key: str, **headers: str) -> Any:
        asked = {"Authorization": f"Bearer {self.tokens.get(key, key)}", **headers}
        return self.server.http.get(path, headers=asked)

    def complete(self, key: str, **body: Any) -> Any:
        return self.server.http.post(
            "/v1/completions",
            json={"model": self.server.name, "prompt": "x", "max_tokens": 2, **body},
            headers={"Authorization": f"Bearer {self.tokens[key]}"},
        )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("server-folder")
    tokens = {
        name: add_key(
            folder / "keys.toml", lambda sha, n=name, f=fields: ApiKey(name=n, sha256=sha, **f)
        )
        for name, fields in KEYS.items()
    }
    model = write_tiny_model(folder / "tiny.gguf")
    with ServerProcess(
        [model],
        keys=str(folder / "keys.toml"),
        timing={"starts": 1},
        adapter_folder=str(folder),
    ) as server:
        yield Guarded(server, folder, tokens)


def lines(text: str) -> list[tuple[str, dict[str, str]]]:
    return [(s.name, s.labels) for f in text_string_to_metric_families(text) for s in f.samples]


def test_a_key_sees_the_metrics_of_its_own_requests(served: Guarded) -> None:
    for name in ("alice", "bob"):
        assert served.complete(name).status_code == 200
    page = served.get("/metrics", "alice").text
    shown = lines(page)
    assert {labels["key"] for _, labels in shown} == {"alice"}
    names = {name for name, _ in shown}
    assert {"sartor_requests_total", "sartor_prompt_tokens_total"} <= names
    assert "bob" not in page
    accept = "application/openmetrics-text"
    own = served.get("/metrics", "alice", Accept=accept)
    assert own.headers["content-type"].startswith(accept)
    families = list(openmetrics_families(own.text))
    assert {s.labels["key"] for f in families for s in f.samples} == {"alice"}
    # Who has asked for nothing sees nothing, and that is a valid page too.
    assert lines(served.get("/metrics", "narrow").text) == []
    list(openmetrics_families(served.get("/metrics", "narrow", Accept=accept).text))


@pytest.mark.parametrize("name", ["watcher", "boss"])
def test_some_keys_see_all_metrics(served: Guarded, name: str) -> None:
    for each in ("alice", "bob"):
        assert served.complete(each).status_code == 200
    shown = lines(served.get("/metrics", name).text)
    assert {"alice", "bob"} <= {labels["key"] for _, labels in shown if "key" in labels}
    assert {"sartor_worker_up", "process_resident_memory_bytes"} <= {name for name, _ in shown}


def test_the_command_gives_the_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.toml"
    assert guarded(["keys", "add", str(path), "scraper", "--metrics"]) == 0
    assert guarded(["keys", "add", str(path), "other"]) == 0
    scraper, other = read_keys(path)
    assert (scraper.metrics, scraper.admin, scraper.sees_all) == (True, False, True)
    assert other.sees_all is False
    assert "metrics = true" in path.read_text()
    capsys.readouterr()
    assert guarded(["keys", "list", str(path)]) == 0
    assert "scraper: share 1, metrics yes" in capsys.readouterr().out


# Health, and errors of loading; the last test with this server, which breaks it ---------------


def test_adapters_that_cannot_be_loaded_are_named_without_folders(served: Guarded) -> None:
    (served.folder / "empty adapter").mkdir()
    answer = served.server.http.post(
        "/v1/load_lora_adapter",
        json={"lora_name": "poet", "lora_path": "empty adapter"},
        headers={"Authorization": f"Bearer {served.tokens['boss']}"},
    )
    assert answer.status_code == 400
    assert "empty adapter" in answer.text
    assert str(served.folder) not in answer.text
    odd = served.server.http.post(
        "/v1/load_lora_adapter",
        json={"lora_name": "po\u202eet", "lora_path": "empty adapter"},
        headers={"Authorization": f"Bearer {served.tokens['boss']}"},
    )
    assert (odd.status_code, odd.json()["error"]["param"]) == (400, "lora_name")


def test_health_tells_strangers_the_status_alone(served: Guarded) -> None:
    server, name = served.server, served.server.name
    nothing = {"status": "ok", "models": {}}
    assert server.health().json() == nothing
    assert served.get("/health", "wrong").json() == nothing
    assert served.get("/health", "narrow").json() == nothing
    for key in ("alice", "watcher", "boss"):
        assert served.get("/health", key).json() == {"status": "ok", "models": {name: "ready"}}

    (served.folder / "tiny.gguf").write_bytes(b"GGUF, and no more of it")
    server.worker().kill()
    wait_until(lambda: server.health().json()["status"] == "failed", 30)
    assert server.health().json() == {"status": "failed", "models": {}}
    assert served.get("/health", "narrow").json() == {"status": "failed", "models": {}}
    assert served.get("/health", "alice").json()["models"] == {name: "failed"}
    for key in ("watcher", "boss"):
        reason = served.get("/health", key).json()["models"][name]
        assert "could not be started: tiny.gguf: " in reason
        assert str(served.folder) not in reason
    refused = served.complete("alice")
    assert refused.status_code == 503
    assert str(served.folder) not in refused.text


def test_health_without_keys(start_server: Start, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf")
    server = start_server([model], timing={"starts": 1})
    evil = [{"Host": "evil.example"}, {"Origin": "https://evil.example"}]
    for headers in evil:
        answer = server.http.get("/health", headers=headers)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok", "models": {}})
    model.write_bytes(b"GGUF, and no more of it")
    server.worker().kill()
    wait_until(lambda: "could not be started" in server.health().text, 30)
    assert str(tmp_path) not in server.health().text
    for headers in evil:
        answer = server.http.get("/health", headers=headers)
        assert (answer.status_code, answer.json()) == (503, {"status": "failed", "models": {}})


# The Host header ------------------------------------------------------------------------------


def hosts(host: str, *allowed: str) -> Hosts:
    with bind(host, 0) as sock:
        return Hosts.of(sock, host, allowed)


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        "localhost",
        "LocalHost.:8000",
        "app.localhost:1",
        "127.0.0.1:8000",
        "127.9.9.9",
        "[::1]:8000",
        "[::ffff:127.0.0.1]",
        socket.gethostname(),
        f"{socket.gethostname().upper()}:8000",
    ],
)
def test_names_of_this_machine_are_known(host: str | None) -> None:
    assert hosts("127.0.0.1").know(host)
    assert hosts("0.0.0.0").know(host)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "127.0.0.1@evil.example",
        "evil.example/127.0.0.1",
        "localhost evil.example",
        "evil.example:80:80",
        "[::1].evil.example",
        "xlocalhost",
        ".",
        "*",
        "2130706433",
    ],
)
def test_names_of_others_are_not_known(host: str) -> None:
    assert not hosts("127.0.0.1").know(host)
    assert not hosts("0.0.0.0").know(host)


def test_addresses_where_the_server_listens() -> None:
    assert not hosts("127.0.0.1").know("192.0.2.1")
    everywhere = hosts("0.0.0.0")
    assert everywhere.know("192.0.2.1:8000")
    assert everywhere.know("[2001:db8::1]:8000")
    one = Hosts(frozenset(), bound=ipaddress.ip_address("192.0.2.1"))
    assert one.know("192.0.2.1:8000")
    assert not one.know("192.0.2.2")


def test_further_names() -> None:
    found = hosts("127.0.0.1", "Box.Example.org", "[2001:db8::1]")
    assert found.know("box.example.org:8000")
    assert found.know("[2001:db8::1]:8000")
    assert not found.know("www.box.example.org")
    assert hosts("127.0.0.1", "*").know("evil.example")
    check_hosts(["*", "box", "192.0.2.1", "::1", "[::1]"])
    for wrong in ("", "http://box", "box:80", "[::1]:80", "box/path", "a@box", "a b"):
        with pytest.raises(UsageError, match="is no name of a host"):
            check_hosts([wrong])


def ask(server: ServerProcess, head: str) -> tuple[int, Any]:
    with RawClient(server) as client:
        return client.send(f"{head}\r\n\r\n".encode()).answer()


def test_a_name_that_was_made_to_point_here_is_refused(start_server: Start) -> None:
    server = start_server(allowed_hosts=["box.example"])
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
        status, body = ask(server, f"GET {path} HTTP/1.1\r\nHost: evil.example:8000")
        assert status == 421, path
        error = body["error"]
        assert error["code"] == "misdirected_request"
        assert "evil.example:8000" in error["message"]
        assert "--allowed-host" in error["message"]
    assert ask(server, "GET http://evil.example/v1/models HTTP/1.1\r\nHost: localhost")[0] == 421
    assert ask(server, "GET http://localhost/v1/models HTTP/1.1\r\nHost: evil.example")[0] == 200
    assert ask(server, "GET /v1/models HTTP/1.1\r\nHost: box.example")[0] == 200
    assert ask(server, "GET /v1/models HTTP/1.0")[0] == 200  # no browser asks without a name
    status, body = ask(server, f"GET /v1/models HTTP/1.1\r\nHost: {'a' * 5000}")
    assert status == 421
    assert len(json.dumps(body)) < 600


def test_with_keys_any_name_will_do(served: Guarded) -> None:
    assert served.get("/v1/models", "alice", Host="evil.example").status_code == 200


# Folders --------------------------------------------------------------------------------------


def test_models_are_shown_without_their_folders(start_server: Start, tmp_path: Path) -> None:
    one, two = (tmp_path / name / "tiny.gguf" for name in ("one", "two"))
    for path in (one, two):
        path.parent.mkdir()
        write_tiny_model(path)
    other = write_tiny_model(tmp_path / "other.gguf")
    server = start_server([one, two, other])
    body = {"prompt": "x", "max_tokens": 1}
    names = ["one/tiny.gguf", "two/tiny.gguf", "other.gguf"]
    assert [card["id"] for card in server.http.get("/v1/models").json()["data"]] == names
    for model in (*names, str(one), str(two), str(other)):
        answer = server.post("/v1/completions", {**body, "model": model})
        assert (answer.status_code, answer.json()["model"]) == (200, model)
    missing = server.post("/v1/completions", {**body, "model": "tiny.gguf"})
    assert missing.status_code == 404
    assert f"served are {', '.join(names)}" in missing.text
    for path in ("/v1/models", f"/v1/models/{one}", "/metrics", "/health", "/openapi.json"):
        page = server.http.get(path)
        assert page.status_code == 200, path
        assert str(tmp_path) not in page.text.replace(f'"id":"{one}"', "")
    counted = [
        s for s in lines(server.http.get("/metrics").text) if s[0] == "sartor_requests_total"
    ]
    assert {labels["model"] for _, labels in counted} == {*names, ""}


def test_a_key_sees_the_path_that_it_may_ask_for(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf")
    keys = {"path": {"models": (str(path),)}, "other": {"models": ("other",)}}
    with KeyedServer([path], tmp_path, keys) as server:

        def seen(key: str) -> list[str]:
            answer = server.process.http.get("/v1/models", headers=server.headers(key))
            return [card["id"] for card in answer.json()["data"]]

        assert seen("path") == [str(path)]
        assert seen("other") == []
        assert server.complete("path", model=str(path)).status_code == 200
        assert str(path) in server.complete("path", model="none").text
        assert str(path) not in server.complete("other", model="none").text


def test_names_of_models_that_are_given_by_path() -> None:
    def named(*paths: str) -> list[str]:
        return served_names_of([Path(path) for path in paths], [()] * len(paths))

    assert named("/a/m.gguf") == ["m.gguf"]
    assert named("/a/m.gguf", "/b/m.gguf", "/b/n") == ["a/m.gguf", "b/m.gguf", "n"]
    assert named("/x/a/m", "/y/a/m") == ["x/a/m", "y/a/m"]
    assert named("/h/models--org--big--m/snapshots/0a1b") == ["org/big--m"]
    assert served_names_of([Path("/a/m")], [{"m"}]) == ["a/m"]
    assert served_names_of([Path("/m")], [{"m"}]) == ["m-1"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/srv/m/a.gguf: it is cut", "a.gguf: it is cut"),
        ("[Errno 2] No such file: '/srv//m/a.gguf'", "[Errno 2] No such file: 'a.gguf'"),
        ("x: C:\\models\\a.gguf: it is cut", "x: a.gguf: it is cut"),
        ("see https://example.org/a/b and use b/c", "see https://example.org/a/b and use b/c"),
        ("/known dir/a b.gguf: it is cut", "a b.gguf: it is cut"),
        ("/known dir/config.json: no JSON", "known dir/config.json: no JSON"),
    ],
)
def test_messages_lose_their_folders(text: str, shown: str) -> None:
    assert without_folders(text, ["/known dir/a b.gguf", "/known dir", ""]) == shown
