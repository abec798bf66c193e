"""A driver of no engine: it counts, fails, hangs and dies as the name of the model says."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.parent / "benchmarks" / "drivers"))

from protocol import Answer, Load, LoopDriver, Tokens, serve


class FakeDriver(LoopDriver):
    def load(self, request: Load) -> Answer:
        print("noise on standard output", flush=True)
        os.write(1, b"noise below Python\n")
        self.calls: list[str] = []
        if request.model == "dies":
            print("out of luck", file=sys.stderr, flush=True)
            os._exit(3)
        if request.model == "fails":
            raise ValueError("no such\nmodel")
        if request.model == "hangs":
            time.sleep(60)
        return {"version": "1", "settings": f"{request.threads} threads"}

    def prepare(self, sequences: int) -> None:
        self.calls.append(f"prepare {sequences}")

    def start(self, prompts: Sequence[Tokens]) -> None:
        self.calls.append(f"start {[len(prompt) for prompt in prompts]}")

    def step(self) -> None:
        self.calls.append("step")

    def end(self) -> None:
        self.calls.append("end")

    def ceilings(self, seconds: float) -> Answer:
        return {"calls": self.calls}


if __name__ == "__main__":
    serve(FakeDriver())
