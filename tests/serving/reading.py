"""Readers of streams, as threads: what came, choice by choice, to compare it to the byte."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from typing import Any

import httpx
from server_process import ServerProcess


@dataclass
class Choice:
    """All that a stream said of one choice."""

    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None


class Reading(threading.Thread):
    """Reads one stream to its end: a chat where ``body`` has messages, else a completion."""

    def __init__(self, server: ServerProcess, **body: Any) -> None:
        super().__init__(daemon=True)
        self.choices: dict[int, Choice] = {}
        self.usage: Any = None
        self.pieces = 0
        self.problem: Any = None
        self._path = f"{server.url}/v1/{'chat/' if 'messages' in body else ''}completions"
        self._body = {
            "model": server.name,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 40,
            "ignore_eos": True,
            **body,
        }
        self.start()

    def run(self) -> None:
        try:
            with (
                httpx.Client(timeout=60, verify=False) as client,
                client.stream("POST", self._path, json=self._body) as response,
            ):
                if response.status_code != 200:
                    self.problem = response.read()
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        self._take(json.loads(line[6:]))
        except httpx.HTTPError as error:
            self.problem = error

    def _take(self, data: Any) -> None:
        if "error" in data:
            self.problem = data["error"]
            return
        self.usage = data["usage"] or self.usage
        for new in data["choices"]:
            choice = self.choices.setdefault(new["index"], Choice())
            delta = new.get("delta")
            text = new["text"] if delta is None else delta.get("content") or ""
            choice.text += text
            self.pieces += bool(text)
            if logprobs := new.get("logprobs"):
                if "text_offset" in logprobs:  # counts from the stream's start
                    logprobs = list(zip(*(logprobs[k] for k in sorted(logprobs)), strict=True))
                else:
                    logprobs = logprobs["content"]
                choice.logprobs += logprobs
            choice.finish_reason = new["finish_reason"] or choice.finish_reason

    def whole(self) -> tuple[dict[int, Choice], int]:
        """Everything it read. Fails where there was any error."""
        self.join(60)
        assert not self.is_alive(), "the stream did not end"
        assert self.problem is None, self.problem
        assert all(choice.finish_reason for choice in self.choices.values())
        return self.choices, self.usage["completion_tokens"]
