"""Options that several commands share, and the values they make."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sartor.plan import ExecutionPlan

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A catalogue name, source or path.", show_default=False),
]
Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...", help="Catalogue names, sources or paths.", show_default=False
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, and nothing else there.")
]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 uses every core.")]
Context = Annotated[
    int,
    typer.Option(help="Longest prompt + answer in tokens; 0 takes the model's own limit."),
]
Backend = Annotated[str, typer.Option(help="Backend name (see `sartor devices`).")]
Device = Annotated[str, typer.Option(help="Device name (see `sartor devices`).")]
Kv = Annotated[str, typer.Option(help="Storage of keys and values: bf16, fp16, fp32 or int8.")]
Activation = Annotated[
    str, typer.Option(help="Arithmetic of quantised linear layers: int8 or fp32.")
]
HeadBits = Annotated[
    int,
    typer.Option(
        metavar="2-8",
        help="Quantise the weights that make the logits again, to so many bits where they have "
        "more: faster, at a cost that `sartor eval` tells; 0 keeps them.",
    ),
]
Isa = Annotated[
    str, typer.Option(help="CPU instruction-set path (see `sartor devices`); auto takes the best.")
]

SpecialInText = Annotated[
    bool,
    typer.Option(
        "--special-in-text/--no-special-in-text",
        help="In chats, read control tokens that a message spells (<|im_end|>) as such tokens, not "
        "as text.",
    ),
]

Tune = Annotated[
    bool,
    typer.Option(
        help="Use the kernels that were fastest here (`sartor tune`; an idle server measures "
        "too); changes no answer."
    ),
]


_UNITS = {"B": 1} | {
    f"{prefix}{suffix}": base ** (power + 1)
    for power, prefix in enumerate("KMGT")
    for suffix, base in (("B", 1000), ("iB", 1024), ("", 1024))
}


def size(text: str) -> int:
    """Bytes of a size like 3GB (10^9), 512MiB or 2G (powers of 1024). Raises UsageError."""
    from sartor.errors import UsageError

    number = text.rstrip("BbiKkMmGgTt ")
    unit = text[len(number) :].strip()
    known = {name.lower(): factor for name, factor in _UNITS.items()}
    try:
        count = float(number) * known[unit.lower() or "b"]
        if not 0 < count < 2**60:
            raise ValueError
    except (ValueError, KeyError):
        raise UsageError(
            f"{text!r} is no size in memory; write a number and a unit, like 3GB or 512MiB"
        ) from None
    return int(count)


def adapters(named: list[str] | None) -> dict[str, Path]:
    """Adapters given as NAME=FOLDER. Raises UsageError."""
    from sartor.errors import UsageError

    found: dict[str, Path] = {}
    for text in named or ():
        name, sign, folder = text.partition("=")
        if not name or not sign or not folder:
            raise UsageError(f"--adapter {text}: write it as NAME=FOLDER")
        if name in found:
            raise UsageError(f"--adapter {text}: the name {name} is given twice")
        found[name] = Path(folder)
    return found


def aliases(named: list[str] | None) -> dict[str, str]:
    """Aliases given as NAME=MODEL. Raises UsageError."""
    from sartor.errors import UsageError

    found: dict[str, str] = {}
    for text in named or ():
        name, _, model = text.partition("=")
        if not name or not model:
            raise UsageError(f"--alias {text}: write it as NAME=MODEL")
        if name in found:
            raise UsageError(f"--alias {text}: the name {name} is given twice")
        found[name] = model
    return found


def make_plan(
    *,
    threads: int,
    context: int,
    backend: str,
    device: str,
    kv: str,
    activation: str,
    head_bits: int,
    isa: str,
    **more: object,
) -> ExecutionPlan:
    """The plan that the options ask for. Raises UsageError, which names the field."""
    from sartor.plan import ExecutionPlan

    return ExecutionPlan().replace(
        threads=threads,
        max_context=context,
        backend=backend,
        device=device,
        kv=kv,
        activation=activation,
        head_bits=head_bits,
        isa=isa,
        **more,
    )
