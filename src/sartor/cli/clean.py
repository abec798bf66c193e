"""``sartor clean``: what the model store keeps and nobody needs any more."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from sartor.cli.options import Json
from sartor.cli.screen import print_json, print_table, say, size

if TYPE_CHECKING:
    from sartor.store.leftovers import Leftover

_KINDS = {
    "download": "unfinished download",
    "model": "damaged model",
    "copy": "second copy",
    "lock": "lock",
    "packed": "packed weights",
    "tuned": "kernel timings",
}


def clean(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove it without asking.")] = False,
    all_packed: Annotated[
        bool,
        typer.Option(
            "--all-packed",
            help="Packed weights of models that are here too; their next start makes them again.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Show what is of no more use, and remove it.

    That is: old unfinished downloads, packed weights of models that are gone, and the like. In a
    terminal you are asked before anything is removed; elsewhere only --yes removes it.
    """
    from sartor.engine.housekeeping import PackedFolder, discard, leftovers
    from sartor.store import ModelStore

    store = ModelStore()
    found = leftovers(store, all_packed=all_packed)
    total = sum(leftover.nbytes for leftover in found)
    if not json:
        _show(found, total, PackedFolder(store.root).nbytes)
    answer = None if yes or json or not found else _ask(total)
    agreed = bool(found) and (yes or answer is True)
    freed = [discard(store, leftover) if agreed else 0 for leftover in found]
    if json:
        print_json(
            {
                "leftovers": [
                    {
                        "kind": leftover.kind,
                        "path": str(leftover.path),
                        "size_bytes": leftover.nbytes,
                        "why": leftover.why,
                        "removed": agreed and (count > 0 or not leftover.path.exists()),
                    }
                    for leftover, count in zip(found, freed, strict=True)
                ],
                "size_bytes": total,
                "freed_bytes": sum(freed),
            }
        )
    elif agreed:
        print(f"{size(sum(freed))} freed")
        for leftover, count in zip(found, freed, strict=True):
            if not count and leftover.path.exists():
                say(f"{leftover.path} could not be removed, or has come into use")
    elif found:
        say("nothing was removed" + ("; --yes removes it" if answer is None else ""))


def _show(found: list[Leftover], total: int, packed: int) -> None:
    if not found:
        print("there is nothing to clean")
        if packed:
            say(
                f"packed weights of models that are in use: {size(packed)}; `sartor clean "
                "--all-packed` shows them too"
            )
        return
    rows = [["SIZE", "WHAT", "WHY"]]
    by_reason: dict[tuple[str, str], list[Leftover]] = {}
    for leftover in found:
        by_reason.setdefault((leftover.kind, leftover.why), []).append(leftover)
    for (kind, why), group in by_reason.items():
        count = f", {len(group)} of them" if len(group) > 1 else ""
        rows.append([size(sum(one.nbytes for one in group)), f"{_KINDS[kind]}{count}", why])
    print_table(rows)
    print(f"{size(total)} in all")


def _ask(total: int) -> bool | None:
    """What the person at the terminal says; None where there is no terminal."""
    streams = (sys.stdin, sys.stdout, sys.stderr)
    if not all(stream is not None and stream.isatty() for stream in streams):
        return None
    sys.stderr.write(f"remove this and free {size(total)}? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
