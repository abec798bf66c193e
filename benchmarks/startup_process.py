"""One fresh process of ``startup.py``: loads a model, then says or does what is asked.

    python startup_process.py MODEL                   seconds of the load
    python startup_process.py MODEL modules           the same, then the modules it has imported
    python startup_process.py MODEL after MODULE...   the same, with these imported before
    python startup_process.py MODEL answer PROMPT     the same, then figures of an answer as JSON

It imports nothing before the load that the load would not import itself.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sartor import LLM

_OWN = {"sartor", "numpy", "tokenizers", "jinja2", "msgspec", "concurrent"}
"""Packages whose modules a load imports."""


def main(model: str, task: str = "", *arguments: str) -> None:
    if task == "after":
        from importlib import import_module

        for name in arguments:
            import_module(name)
    from sartor import LLM

    started = time.perf_counter()
    llm = LLM(model, max_sequences=1)
    print(time.perf_counter() - started, flush=True)
    if task == "modules":
        print(*(name for name in sys.modules if name.partition(".")[0] in _OWN))
    if task == "answer":
        answer(llm, arguments[0])


def answer(llm: LLM, prompt: str) -> None:
    """Decodes 128 tokens; prints memory, and the time of a step inside and outside of the core."""
    import json
    from itertools import pairwise
    from pathlib import Path
    from statistics import median

    from sartor import SamplingParams
    from sartor.bench.memory import peak_rss_bytes

    executable: Any = llm._loaded.executable
    core = executable._native = _Timed(executable._native)
    engine: Any = llm._engine
    params = SamplingParams(temperature=0, max_tokens=128, ignore_eos=True)
    for _ in llm.stream(prompt, params):
        pass
    records = list(engine.records)
    decodes = pairwise(record.started for record in records[1:])  # the first read the prompt
    steps = [after - before for before, after in decodes]
    hosts = [step - inside for step, inside in zip(steps, core.seconds[1:-1], strict=True)]
    groups = range(len(executable.program.groups()))
    held = [max(record.blocks_held[group] for record in records) for group in groups]
    status = Path("/proc/self/status")
    pages: dict[str, int] = {}
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.startswith("Rss"):
                pages[name] = int(value.split()[0]) * 1024
    figures = {
        "peak": peak_rss_bytes(),
        "weights": executable.memory().weights,
        "state": sum(n * executable.block_bytes(g) for g, n in zip(groups, held, strict=True)),
        "anonymous": pages.get("RssAnon"),
        "file": pages.get("RssFile"),
        "step": median(steps),
        "host": median(hosts),
    }
    print(json.dumps(figures))


class _Timed:
    """The native executor, with the seconds of each step."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self.seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def run(self, *arguments: object) -> object:
        started = time.perf_counter()
        result = self._native.run(*arguments)
        self.seconds.append(time.perf_counter() - started)
        return result


if __name__ == "__main__":
    main(*sys.argv[1:])
