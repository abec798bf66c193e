"""A server with keys, for tests of what one key can do to another."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from server_process import ServerProcess

from sartor.serving.keys import ApiKey, add_key


class KeyedServer:
    """``keys``: names, and the fields of each entry. Further options go to ``serve``."""

    def __init__(
        self, models: list[Path], folder: Path, keys: dict[str, dict[str, Any]], **options: Any
    ) -> None:
        path = folder / "keys.toml"
        self.tokens = {
            name: add_key(path, lambda sha, n=name, f=fields: ApiKey(name=n, sha256=sha, **f))
            for name, fields in keys.items()
        }
        self.process = ServerProcess(models, keys=str(path), **options)

    def __enter__(self) -> KeyedServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.process.stop()

    @property
    def name(self) -> str:
        return self.process.name

    def headers(self, key: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.tokens[key]}"}

    def head(self, key: str, path: str, length: int) -> bytes:
        """The head of a request, for a raw connection."""
        return (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n"
            f"Authorization: Bearer {self.tokens[key]}\r\n\r\n"
        ).encode()

    def complete(self, key: str, **body: Any) -> httpx.Response:
        return self.process.http.post(
            "/v1/completions",
            json={"model": self.name, "prompt": "x", "max_tokens": 1, **body},
            headers=self.headers(key),
            timeout=120,
        )

    def metrics(self, key: str) -> str:
        return self.process.http.get("/metrics", headers=self.headers(key)).text
