"""Sartor's engine in this process: seconds from a request to its first token, for any prompt."""

from __future__ import annotations

import itertools
import time

from protocol import Answer, Tokens, serve
from run_sartor import SartorDriver

from sartor.engine.request import Request
from sartor.graph import SamplingParams


class FirstTokenDriver(SartorDriver):
    _ids = itertools.count()

    def single(self, seed: int, prompt: Tokens, steps: int) -> Answer:
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=steps + 1)
        request = Request(str(next(self._ids)), tuple(prompt), params, seed)
        begun = time.perf_counter()
        self._engine.add(request)
        while not any(chunk.tokens for chunk in self._engine.step()):
            continue
        first = time.perf_counter()
        while self._engine.has_work:
            self._engine.step()
        return {"prompt_seconds": first - begun, "decode_seconds": time.perf_counter() - first}


if __name__ == "__main__":
    serve(FirstTokenDriver())
