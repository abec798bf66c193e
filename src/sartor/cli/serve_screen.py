"""What ``sartor serve`` shows once it is ready."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import TYPE_CHECKING

from sartor.cli.screen import arithmetic, size
from sartor.printable import plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sartor.plan import ExecutionPlan
    from sartor.serving.frontend import ServedModel
    from sartor.serving.startup import Started

_LEAST_WIDTH = 40


def show(started: Started) -> None:
    """Prints the ready line, the facts and a call to try: in one piece, so that whoever reads
    only the first line of a pipe breaks nothing."""
    width = None
    if sys.stdout is not None and sys.stdout.isatty():
        width = max(_LEAST_WIDTH, shutil.get_terminal_size().columns)
    lines = [started.ready_line, "", *_aligned(facts(started), width), "", started.example()]
    print("\n".join(map(plain, lines)), flush=True)


def facts(started: Started) -> list[tuple[str, str]]:
    """Names and values, of what can be asked for first and of how it runs then. A name that is
    empty goes on with the one before."""
    first, *others = started.urls
    found = [("address", f"{first}/v1")]
    if others:
        found.append(("", "from other machines " + ", ".join(f"{url}/v1" for url in others)))
    for model in started.models:
        found.append(("" if found[-1][0] == "model" else "model", _model(model)))
    found += _sampling(started)
    plans = dict.fromkeys(h.plan for h in started.hosted.values() if h.plan is not None)
    found += [("runs on", _plan(plan)) for plan in plans]
    found.append(("memory", _memory(started)))
    tunes = any(plan.tune for plan in plans)
    found.append(("tuning", "when idle (--no-tune: never)" if tunes else "off"))
    found.append(("keys", _keys(started)))
    return found


def _model(model: ServedModel) -> str:
    if model.makes == "embeddings":
        does = "embeddings"
    else:
        does = "chat" if model.template is not None else "completions, no chat template"
    names = "".join(f", also {name}" for name in model.listed)
    adapters = "".join(f", adapter {name}" for name in model.adapters)
    presets = "".join(f", preset {name}" for name in model.presets)
    context = f"{model.context_length} tokens of context"
    return f"{model.name}: {does}, {context}{names}{adapters}{presets}"


def _sampling(started: Started) -> Iterator[tuple[str, str]]:
    """How tokens are drawn where requests say nothing: of models that write text, and presets."""
    from sartor.graph import describe_sampling
    from sartor.serving.names import served_names

    first = True
    for served in served_names({model.name: model for model in started.models}):
        alias = served.name != served.model.name and served.preset is None
        if served.model.makes == "text" and not alias:
            yield (
                "sampling" if first else "",
                f"{served.name}: {describe_sampling(*served.sampling)}",
            )
            first = False


def _plan(plan: ExecutionPlan) -> str:
    where = plan.device if plan.isa == "auto" else f"{plan.device} {plan.isa}"
    threads = f"{plan.threads} thread{'' if plan.threads == 1 else 's'}"
    return f"{where}, {threads}, {arithmetic(plan.activation, plan.kv, plan.head_bits)}"


def _memory(started: Started) -> str:
    held = [hosted.memory for hosted in started.hosted.values()]
    parts = [
        f"{size(total)} of {what}"
        for what in ("weights", "state")
        if (total := sum(memory.get(what, 0) for memory in held))
    ]
    if started.memory_bytes is not None:
        parts.append(f"limit {size(started.memory_bytes)}")
    return ", ".join(parts) or "none"


def _keys(started: Started) -> str:
    if started.keys is None:
        return "none needed"
    if not started.keys:
        return "needed, but there are none: nobody gets in"
    return f"needed, {started.keys} in the file"


def _aligned(pairs: Sequence[tuple[str, str]], width: int | None) -> Iterator[str]:
    """One pair a line, broken where the screen is narrower."""
    column = max(len(name) for name, _ in pairs) + 2
    for name, value in pairs:
        lines = [value]
        if width is not None:
            lines = textwrap.wrap(
                value, width - column, break_long_words=False, break_on_hyphens=False
            )
        for index, line in enumerate(lines):
            yield f"{'' if index else name:{column}}{line}"
