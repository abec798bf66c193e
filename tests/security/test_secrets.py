"""Keys and tokens are nowhere but where they are used."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from raw_client import RawClient
from server_process import ServerProcess, kill_hard, wait_until

from sartor.cli.main import guarded
from sartor.serving.environment import child_environment, is_secret
from sartor.serving.keys import ApiKey, add_key
from sartor.serving.request_log import json_line, text_line
from sartor.serving.request_record import RequestRecord
from sartor.serving.tracing import attributes
from sartor.store import hub
from sartor.store.download import NoAnswerError, Patience
from sartor.store.pip_download import pip_download
from sartor.store.progress import Silent
from sartor.store.redacted import redacted
from sartor.store.reference import parse_source
from sartor.store.source import SourceError

CANARY = "canary0123456789"
ENVIRONMENT = {
    "HF_TOKEN": f"hf_{CANARY}",
    "HUGGING_FACE_HUB_TOKEN": f"hf_{CANARY}",
    "MODELSCOPE_API_TOKEN": CANARY,
    "SARTOR_HF_TOKEN": CANARY,
    "OTEL_EXPORTER_OTLP_HEADERS": f"authorization={CANARY}",
    "HTTPS_PROXY": f"http://me:{CANARY}@proxy.invalid:1",
    "PIP_INDEX_URL": f"https://{CANARY}@index.invalid/simple",
    "AWS_SECRET_ACCESS_KEY": CANARY,
}


def processes(server: ServerProcess) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def outside(process: psutil.Process) -> list[str]:
    """What other processes of the same user can read of one; nothing once it has ended."""
    with contextlib.suppress(psutil.Error):
        return [" ".join(process.cmdline()), json.dumps(process.environ())]
    return []


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_server_tells_no_secret(
    start_server: Callable[..., ServerProcess], tmp_path: Path, form: str
) -> None:
    keys, log = tmp_path / "keys.toml", tmp_path / "log"
    token = add_key(keys, lambda sha: ApiKey(name="boss", sha256=sha, admin=True))
    server = start_server(
        keys=str(keys),
        telemetry={"log": form, "log_file": str(log), "log_client": True},
        adapter_folder=str(tmp_path),
        environment=ENVIRONMENT,
        wait=False,
    )
    server.read_ready_line()
    secrets = (token, token.removeprefix("sk-sartor-"), CANARY)
    bearer = {"Authorization": f"Bearer {token}"}
    wrong = {"Authorization": f"Bearer {CANARY}"}
    body: dict[str, Any] = {"model": server.name, "prompt": "x", "max_tokens": 2}
    shown = [server.ready_line]

    def take(answer: Any) -> int:
        shown.extend((answer.text, str(answer.headers)))
        status: int = answer.status_code
        return status

    def post(headers: dict[str, str], **more: Any) -> int:
        return take(server.http.post("/v1/completions", json={**body, **more}, headers=headers))

    assert post(bearer) == 200
    assert post(bearer, stream=True) == 200
    assert post(bearer, model="nobody") == 404
    assert post(bearer, metadata={"a": "b" * 200_000}) == 200  # in a process of its own
    assert post(wrong) == 401
    assert post({"Authorization": f"Basic {CANARY}"}) == 401
    load = {"lora_name": "poet", "lora_path": "."}
    assert take(server.http.post("/v1/load_lora_adapter", json=load, headers=bearer)) == 400
    for path in ("/metrics", "/health", "/v1/models", "/openapi.json", "/nowhere"):
        for headers in (bearer, wrong):
            take(server.http.get(path, headers=headers))
    with RawClient(server) as client:  # no HTTP request
        client.send(f"GET / HTTP/1.1\nAuthorization: Bearer {token}\r\n\r\n".encode())
        shown.append(client.read_to_end().decode("latin-1"))

    children = processes(server)
    assert len(children) >= 2  # the worker, and the one for long requests
    shown += [seen for process in children for seen in outside(process)]
    shown.append(" ".join(psutil.Process(server.process.pid).cmdline()))
    assert sum("sartor.serving." in seen for seen in shown[-2 * len(children) :]) >= 2
    kill_hard(server.worker())
    wait_until(lambda: server.http.get("/health").status_code == 200, 30)
    shown += [seen for process in processes(server) for seen in outside(process)]
    server.process.terminate()
    assert server.process.stderr is not None
    assert server.process.stdout is not None
    shown += [server.process.stdout.read(), server.process.stderr.read()]
    server.process.wait(20)
    shown += [log.read_text(encoding="utf-8"), keys.read_text(encoding="utf-8")]
    assert "boss" in shown[-2]
    for text in shown:
        for secret in secrets:
            assert secret not in text


def test_what_is_known_of_a_request_has_no_headers() -> None:
    headers = [
        (b"authorization", f"Bearer {CANARY}".encode()),
        (b"cookie", CANARY.encode()),
        (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    ]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers, "client": None}
    record = RequestRecord.of(scope)
    texts = (repr(record), json_line(record, True), text_line(record, True))
    assert all(CANARY not in text for text in (*texts, str(attributes(record))))


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        *((name, value, True) for name, value in ENVIRONMENT.items()),
        ("huggingface_token", "x", True),
        ("DB_PASSWORD", "x", True),
        ("OPENAI_API_KEY", "x", True),
        ("TOKENIZERS_PARALLELISM", "false", False),
        ("SARTOR_SERVE_KEYS", "keys.toml", False),
        ("SARTOR_HOME", "/srv", False),
        ("PATH", "/bin:/usr/bin", False),
        ("HF_ENDPOINT", "https://mirror.example/a@b", False),
        ("OMP_NUM_THREADS", "2", False),
    ],
)
def test_secrets_of_the_environment(name: str, value: str, secret: bool) -> None:
    assert is_secret(name, value) is secret


def test_the_environment_of_children(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    found = child_environment(PYTHONPATH="/x")
    assert CANARY not in str(found)
    assert found["PYTHONPATH"] == "/x"
    assert found["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@h/a: 404", "https://***@h/a: 404"),
        ("https://pw@h:1/a", "https://***@h:1/a"),
        ("see https://h/a@b", "see https://h/a@b"),
        ("'https://h/a?X-Amz-Signature=abc&b=c' failed", "'https://h/a?***' failed"),
        ("https://u:p?w@h/x", "https://***@h/x"),
        ("https://u:p/w#@h/x", "https://***@h/x"),
        ("https://h:8443/a@b", "https://h:8443/a@b"),
        ("Authorization: Bearer abcdefghijk", "Authorization: Bearer ***"),
        (f"token hf_{CANARY} refused", "token *** refused"),
        (f"the cache's own: hf_{'aB3' * 8}.", "the cache's own: ***."),
        ("the variable hf_home_of_the_machine", "the variable hf_home_of_the_machine"),
        ("nothing to hide", "nothing to hide"),
    ],
)
def test_messages_of_sources(monkeypatch: pytest.MonkeyPatch, text: str, shown: str) -> None:
    monkeypatch.setenv("HF_TOKEN", f"hf_{CANARY}")
    assert redacted(text) == shown
    assert str(SourceError(text)) == shown
    assert str(NoAnswerError(text)) == shown


def test_a_download_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The library's error names the address, with the password of a mirror."""
    monkeypatch.setenv("HF_TOKEN", f"hf_{CANARY}")
    address = f"https://me:{CANARY}@mirror.invalid/api?token=hf_{CANARY}"
    ref = parse_source("hf:org/model")
    assert ref is not None
    for error in (ConnectionError(address), RuntimeError(f"Bearer hf_{CANARY} at {address}")):

        def fail(_: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(hub, "_huggingface", fail)
        with pytest.raises(SourceError) as raised:
            hub.fetch_hub(ref, (), tmp_path, Any, Any, lambda: None)  # type: ignore[arg-type]
        assert CANARY not in str(raised.value)
        assert "mirror.invalid" in str(raised.value)
    with pytest.raises(SourceError) as raised:
        Patience().wait(lambda: fail(None, ConnectionError(address)), f"at {address}")
    assert CANARY not in str(raised.value)


def test_what_debug_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> int:
        raise RuntimeError(f"at https://me:{CANARY}@mirror.invalid/\x1b[31m")

    monkeypatch.setattr("sartor.cli.app.dispatch", fail)
    assert guarded(["list", "--debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "https://***@mirror.invalid/" in err
    assert CANARY not in err
    assert "\x1b" not in err


def test_pip_gets_no_token_of_a_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, str] = {}

    def popen(*_: Any, env: dict[str, str], **__: Any) -> Any:
        seen.update(env)
        raise OSError("no process in a test")

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(OSError, match="no process"):
        pip_download("package", tmp_path / "work", Silent())
    assert not seen.keys() & {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN"}
    assert seen["PIP_INDEX_URL"] == ENVIRONMENT["PIP_INDEX_URL"]
