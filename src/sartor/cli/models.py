"""``sartor pull``, ``list``, ``show`` and ``rm``: the model store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sartor.cli.options import Json, Model, Models
from sartor.cli.screen import print_facts, print_json, print_table, say, size
from sartor.progress.line import ProgressLine

if TYPE_CHECKING:
    from sartor.store import Source, StoredModel


def pull(models: Models, json: Json = False) -> None:
    """Bring models to this machine."""
    from sartor.store import ModelStore

    store, progress = ModelStore(), ProgressLine()
    pulled = [store.pull(model, progress) for model in models]
    if json:
        print_json({"models": [_stored(model) for model in pulled]})
        return
    for model in pulled:
        print(f"{model.name}  {size(model.size_bytes)}  {model.path}")


def list_models(
    json: Json = False,
    everything: Annotated[
        bool, typer.Option("--all", help="The catalogue's models too, here or not.")
    ] = False,
) -> None:
    """List the models on this machine."""
    from sartor.store import ModelStore

    store = ModelStore()
    stored = {model.name: model for model in store.list()}
    others = [e for e in store.catalogue.entries.values() if e.name not in stored]
    if json:
        shown: dict[str, Any] = {"models": [_stored(model) for model in stored.values()]}
        if everything:
            shown["catalogue"] = [
                {"name": e.name, "title": e.title, "parameters": e.parameters, "license": e.license}
                for e in others
            ]
        print_json(shown)
        return
    rows = [["NAME", "SIZE", "LICENSE", "FROM"]]
    rows += [[m.name, size(m.size_bytes), m.license or "-", m.source] for m in stored.values()]
    if everything:
        rows += [[e.name, "-", e.license, "not here; sartor pull gets it"] for e in others]
    if len(rows) == 1:
        say("no model is here yet; `sartor list --all` shows the catalogue, `sartor pull` gets one")
    else:
        print_table(rows)


def show(model: Model, json: Json = False) -> None:
    """Show what is known of a model."""
    from sartor.store import ModelStore

    known = ModelStore().show(model)
    entry, stored = known.entry, known.stored
    if json:
        catalogue = entry and {
            "title": entry.title,
            "architecture": entry.architecture,
            "parameters": entry.parameters,
            "license": entry.license,
            "note": entry.note or None,
        }
        print_json(
            {
                "name": known.name,
                "stored": stored and _stored(stored),
                "catalogue": catalogue,
                "sources": [
                    {"ref": str(source.ref), "verified": source.verified}
                    for source in known.sources
                ],
            }
        )
        return
    facts = [("name", known.name)]
    if entry is not None:
        facts += [
            ("title", entry.title),
            ("architecture", entry.architecture),
            ("parameters", entry.parameters),
            ("license", entry.license),
        ]
        if entry.note:
            facts.append(("note", entry.note))
    facts += [("source", _source(source)) for source in known.sources]
    facts += _stored_facts(stored) if stored else [("stored", f"no; sartor pull {known.name}")]
    print_facts(facts)


def remove(models: Models, json: Json = False) -> None:
    """Remove models from this machine."""
    from sartor.store import ModelStore

    store = ModelStore()
    freed = {model: store.remove(model) for model in models}
    if json:
        print_json({"removed": [{"name": m, "freed_bytes": n} for m, n in freed.items()]})
        return
    for model, count in freed.items():
        print(f"removed {model}, {size(count)} freed")


def _source(source: Source) -> str:
    return f"{source.ref}{' (verified)' if source.verified else ''}"


def _stored(model: StoredModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "path": str(model.path),
        "source": model.source,
        "size_bytes": model.size_bytes,
        "digest": model.digest,
        "verified": model.verified,
        "license": model.license,
        "pulled_at": model.pulled_at and model.pulled_at.isoformat(),
    }


def _stored_facts(model: StoredModel) -> list[tuple[str, str]]:
    facts = [("stored", str(model.path)), ("size", size(model.size_bytes))]
    if model.digest:
        facts.append(("digest", model.digest + (" (checked)" if model.verified else "")))
    if model.pulled_at:
        facts.append(("pulled", f"{model.pulled_at:%Y-%m-%d %H:%M} from {model.source}"))
    return facts
