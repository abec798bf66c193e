"""Local stand-ins for the sources: a hub that can misbehave, and wheels built on the spot."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = bytes(range(256)) * 8192  # 2 MiB
GGUF = b"GGUF" + WEIGHTS


class Hub:
    """Serves both APIs from ``repos``; the attributes below make it misbehave."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.cut_after: int | None = None  # close the connection after so many bytes of a body
        self.cuts = 0  # how often to do so
        self.pause = 0.0  # seconds to sleep per 64 KiB of a body
        self.wrong_digest = False
        self.honour_range = True
        self.fail_status: int | None = None
        self.ranges: list[str | None] = []  # the Range header of each download
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        query = parse_qs(parts.query)
        if self.fail_status:
            return self.reply(request, self.fail_status, {"error": "no"})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", parts.path):
            return self.hf_info(request, found[1])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", parts.path):
            return self.body(request, found[1], found[2])
        if found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo/files", parts.path):
            return self.modelscope_files(request, found[1])
        if found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo", parts.path):
            return self.body(request, found[1], query["FilePath"][0])
        return self.reply(request, 404, {"error": "no such page"})

    def reply(self, request: BaseHTTPRequestHandler, status: int, content: object) -> None:
        data = json.dumps(content).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def sha256(self, data: bytes) -> str:
        return hashlib.sha256(data + (b"!" if self.wrong_digest else b"")).hexdigest()

    def hf_info(self, request: BaseHTTPRequestHandler, repo: str) -> None:
        if repo not in self.repos:
            return self.reply(request, 404, {"error": "Repository not found"})
        siblings = []
        for name, data in self.repos[repo].items():
            item: dict[str, object] = {"rfilename": name, "size": len(data)}
            blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            item["blobId"] = blob
            if name.endswith((".gguf", ".safetensors")):
                item["lfs"] = {"sha256": self.sha256(data), "size": len(data), "pointerSize": 130}
            siblings.append(item)
        return self.reply(
            request,
            200,
            {"id": repo, "sha": SHA, "siblings": siblings, "cardData": {"license": "mit"}},
        )

    def modelscope_files(self, request: BaseHTTPRequestHandler, repo: str) -> None:
        if repo not in self.repos:
            return self.reply(request, 404, {"Code": 404, "Message": "not found"})
        files = [
            {"Path": n, "Type": "blob", "Size": len(d), "Sha256": self.sha256(d)}
            for n, d in self.repos[repo].items()
        ]
        return self.reply(request, 200, {"Code": 200, "Data": {"Files": files}})

    def body(self, request: BaseHTTPRequestHandler, repo: str, name: str) -> None:
        data = self.repos.get(repo, {}).get(name)
        if data is None:
            return self.reply(request, 404, {"error": "no such file"})
        asked = request.headers.get("Range")
        self.ranges.append(asked)
        start = int(asked[6:-1]) if asked and self.honour_range else 0
        if start >= len(data):
            return self.reply(request, 416, {})
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(data) - start))
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.end_headers()
        end = len(data)
        if self.cut_after is not None and self.cuts > 0:
            self.cuts -= 1
            end = min(end, start + self.cut_after)
        try:
            for at in range(start, end, 1 << 16):
                request.wfile.write(data[at : min(end, at + (1 << 16))])
                time.sleep(self.pause)
        except OSError:
            pass
        if end < len(data):
            request.close_connection = True
        return None


def build_wheel(
    folder: Path,
    name: str,
    files: dict[str, bytes],
    *,
    requires: tuple[str, ...] = (),
    damaged: str | None = None,
) -> Path:
    """Write a wheel; ``damaged`` names a member whose RECORD digest is made wrong."""
    stem = f"{name.replace('-', '_')}-1.0"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nLicense: Apache-2.0\n"
    metadata += "".join(f"Requires-Dist: {r}\n" for r in requires)
    members = {
        **files,
        f"{stem}.dist-info/METADATA": metadata.encode(),
        f"{stem}.dist-info/WHEEL": b"Wheel-Version: 1.0\nTag: py3-none-any\n",
    }
    record = ""
    for member, data in members.items():
        digest = hashlib.sha256(data + (b"!" if member == damaged else b"")).digest()
        text = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        record += f"{member},sha256={text},{len(data)}\n"
    members[f"{stem}.dist-info/RECORD"] = record.encode()
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return path


class Recorder:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.files: list[tuple[str, int | None]] = []
        self.bytes: dict[str, int] = {}
        self.open = False

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def begin(
        self, file: str, total: int | None, unit: str = "bytes", seconds: float | None = None
    ) -> None:
        assert not self.open
        assert (unit, seconds) == ("bytes", None)
        self.open = True
        self.files.append((file, total))
        self.bytes[file] = 0

    def part(self, name: str) -> None:
        raise AssertionError(f"a file has no part {name}")

    def advance(self, n: int) -> None:
        assert self.open
        self.bytes[self.files[-1][0]] += n

    def end(self) -> None:
        assert self.open
        self.open = False
