"""What it costs to render a chat in a process of its own: milliseconds a prompt.

    python benchmarks/chat_template.py MODEL [--chars N] [--rounds N]

The same template and messages are rendered by ``ChatTemplate``, which asks its process, and by the
same code in this process, in turns. MODEL is a GGUF file or a folder.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from sartor.engine.load import load_text
from sartor.formats import open_checkpoint
from sartor.text.template import ChatTemplate
from sartor.text.template_process import TemplateProcess
from sartor.text.template_sandbox import compiled

WORDS = "the quick brown fox jumps over a lazy dog and then rests beside the river "


class _Here(TemplateProcess):
    """Renders where it is called."""

    def render(self, source: str, variables: dict[str, Any]) -> str:
        return compiled(source).render(variables)


@dataclass(frozen=True)
class Result:
    """Seconds of a prompt: median in both ways, the median of the differences, the 99th percentile
    of the process's; and of the first prompt, which waits for the process to start."""

    prompt_chars: int
    here: float
    process: float
    added: float
    process_p99: float
    first: float

    def lines(self) -> list[str]:
        return [
            f"prompt of {self.prompt_chars} characters, milliseconds",
            f"in this process      {self.here * 1e3:.3f}",
            f"in its own           {self.process * 1e3:.3f}",
            f"on top               {self.added * 1e3:.3f}",
            f"its own, p99         {self.process_p99 * 1e3:.3f}",
            f"first, with a start  {self.first * 1e3:.0f}",
        ]


def messages_of(chars: int) -> list[dict[str, str]]:
    """A chat with that many characters in four messages."""
    text = (WORDS * (chars // len(WORDS) + 1))[:chars]
    part = max(1, chars // 4)
    roles = ("system", "user", "assistant", "user")
    return [
        {"role": role, "content": text[i * part : (i + 1) * part]} for i, role in enumerate(roles)
    ]


def measure(source: str, chars: int, rounds: int) -> Result:
    """Renders the same chat both ways in turns."""
    away = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    here = ChatTemplate(source, bos_token="<s>", eos_token="</s>", process=_Here())
    messages = messages_of(chars)
    first, prompt = _timed(lambda: away.render(messages))
    assert here.render(messages) == prompt
    pairs = []
    for _ in range(rounds):
        pairs.append(
            (_timed(lambda: here.render(messages))[0], _timed(lambda: away.render(messages))[0])
        )
    return Result(
        prompt_chars=len(prompt),
        here=median(h for h, _ in pairs),
        process=median(p for _, p in pairs),
        added=median(p - h for h, p in pairs),
        process_p99=quantiles((p for _, p in pairs), n=100)[-1],
        first=first,
    )


def _timed(call: Callable[[], str]) -> tuple[float, str]:
    begin = time.perf_counter()
    text = call()
    return time.perf_counter() - begin, text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="a GGUF file or a folder")
    parser.add_argument("--chars", type=int, default=2000, help="characters of the chat")
    parser.add_argument("--rounds", type=int, default=500)
    options = parser.parse_args(argv)
    checkpoint = open_checkpoint(options.model)
    _, template = load_text(checkpoint, [])
    if template is None or template.fault:
        parser.error(f"{options.model} has no chat template")
    for line in measure(template.source, options.chars, options.rounds).lines():
        print(line)


if __name__ == "__main__":
    main()
