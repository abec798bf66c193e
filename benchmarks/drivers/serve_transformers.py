"""A minimal server over ``transformers``: bf16, greedy, one request after another.

Arguments: folder, model name, port, threads. Needs transformers and torch, and nothing of Sartor.
It knows of the API what a load test sends: streamed completions of a text or of token ids.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
import transformers


class Model:
    """The folder's model and tokenizer; answers one request at a time."""

    def __init__(self, folder: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self._lock = threading.Lock()

    def encode(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return list(self._tokenizer(prompt)["input_ids"])
        return prompt

    def answer(self, prompt: list[int], tokens: int) -> Iterator[str]:
        """The text of each token."""
        with self._lock, torch.inference_mode():
            cache = transformers.DynamicCache(config=self._model.config)
            new = torch.tensor([prompt])
            for _ in range(tokens):
                found = self._model(
                    input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                new = found.logits[:, -1].argmax(-1, keepdim=True)
                yield str(self._tokenizer.decode(new[0]))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    model: Model
    name: str

    def do_GET(self) -> None:
        self._whole({"data": [{"id": self.name}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = self.model.encode(body["prompt"])
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for text in self.model.answer(prompt, body["max_tokens"]):
            self._event({"choices": [{"index": 0, "text": text, "finish_reason": None}]})
        self._event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        usage = {"prompt_tokens": len(prompt), "completion_tokens": body["max_tokens"]}
        self._event({"choices": [], "usage": usage})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def log_message(self, format: str, *args: object) -> None:
        """Not every request is worth a line."""

    def _whole(self, answer: object) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _event(self, data: object) -> None:
        self._chunk(b"data: " + json.dumps(data).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512


def main() -> None:
    folder, name, port, threads = sys.argv[1:]
    Handler.model, Handler.name = Model(folder, int(threads)), name
    Server(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main()
