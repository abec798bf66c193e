"""``sartor pull``, ``list``, ``show`` and ``rm``: the model store."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, TypeGuard

import typer

from sartor.cli.options import Json, Model, Models
from sartor.cli.screen import print_facts, print_json, print_table, say, size
from sartor.printable import plain
from sartor.progress.line import ProgressLine

if TYPE_CHECKING:
    from sartor.engine.describe import ModelFacts
    from sartor.engine.housekeeping import PackedFolder
    from sartor.store import Description, ModelStore, Source, StoredModel


def pull(models: Models, json: Json = False) -> None:
    """Bring models to this machine.

    Of a repository that offers several weight types, Q4_K_M is taken if it fits the memory that is
    free, else the best one that fits; org/name:Q8_0 names another.
    """
    from sartor.store import ModelStore

    store, progress = ModelStore(), ProgressLine()
    pulled = [store.pull(model, progress) for model in models]
    if json:
        packed = _packed_folder(store)
        print_json({"models": [_stored(model, packed) for model in pulled]})
        return
    for model in pulled:
        print(plain(f"{model.name}  {size(model.size_bytes)}  {model.path}"))


def list_models(
    json: Json = False,
    everything: Annotated[
        bool, typer.Option("--all", help="The catalogue's models too, here or not.")
    ] = False,
) -> None:
    """List the models on this machine."""
    from sartor.store import ModelStore

    store = ModelStore()
    packed = _packed_folder(store)
    stored = {model.name: model for model in store.list()}
    others = [e for e in store.catalogue.entries.values() if e.name not in stored]
    if json:
        shown: dict[str, Any] = {"models": [_stored(model, packed) for model in stored.values()]}
        if everything:
            shown["catalogue"] = [
                {"name": e.name, "title": e.title, "parameters": e.parameters, "license": e.license}
                for e in others
            ]
        print_json(shown)
        return
    rows = [["NAME", "SIZE", "PACKED", "LICENSE", "FROM"]]
    for model in stored.values():
        used = packed.bytes_of(model.path)
        rows.append(
            [
                model.name,
                size(model.size_bytes),
                size(used) if used else "-",
                model.license or "-",
                model.source,
            ]
        )
    if everything:
        rows += [[e.name, "-", "-", e.license, "catalogue"] for e in others]
    if len(rows) == 1:
        say("no model is here yet; `sartor list --all` shows the catalogue, `sartor pull` gets one")
    else:
        print_table(rows, cut=True)
    if everything and others:
        say("what is from the catalogue is not here; `sartor pull NAME` gets it")
    if packed.nbytes:
        say(f"packed weights, all: {size(packed.nbytes)}; `sartor clean` shows what can go")


def show(model: Model, json: Json = False) -> None:
    """Show what a model is, and whether it fits this machine.

    What the catalogue knows, and what the model's files say of themselves where they are here.
    """
    from sartor.errors import SartorError
    from sartor.store import ModelStore

    store = ModelStore()
    known = store.show(model)
    facts, problem = None, None
    if known.stored is not None:
        from sartor.engine.describe import describe

        try:
            facts = describe(known.stored.path)
        except SartorError as error:
            if known.stored.pulled_at is None:  # a path: nothing else is known of it
                raise
            problem = f"{error}; `sartor rm {known.name}` and pull it again"
    if json:
        print_json(_shown(known, facts, problem, _packed_folder(store)))
    else:
        print_facts(_known_facts(known))
        if problem is not None:
            print_facts([("problem", problem)])
        if facts is not None:
            _print_file(facts)


def remove(models: Models, json: Json = False) -> None:
    """Remove models and their packed weights from this machine."""
    from sartor.store import ModelStore

    store = ModelStore()
    removed = [_remove(store, model) for model in models]
    if json:
        print_json({"removed": removed})
        return
    for one in removed:
        packed, shared = one["packed_bytes"], one["shared_bytes"]
        of_which = f" ({size(packed)} of it packed weights)" if packed else ""
        print(f"removed {one['name']}, {size(one['freed_bytes'])} freed{of_which}")
        if shared:
            say(f"{size(shared)} stay: another model has the same files")


def _remove(store: ModelStore, model: str) -> dict[str, Any]:
    from sartor.engine.housekeeping import remove_file
    from sartor.errors import SartorError
    from sartor.store.equal import shared_bytes

    packed = _packed_folder(store)
    made = []
    try:
        stored = store.resolve(model)
    except SartorError:  # `store.remove` says what is wrong
        stored = None
    if stored is not None and stored.pulled_at is not None and packed.paths():
        others = [other.path for other in store.list() if other.name != stored.name]
        made = packed.made_from(stored.path, keep=others)
    shared = shared_bytes(stored.path) if stored is not None else 0
    freed = store.remove(model)
    of_packed = sum(map(remove_file, made))
    return {
        "name": model,
        "freed_bytes": freed + of_packed,
        "packed_bytes": of_packed,
        "shared_bytes": shared,
    }


def _packed_folder(store: ModelStore) -> PackedFolder:
    from sartor.engine.housekeeping import PackedFolder

    return PackedFolder(store.root)


def _writes_text(facts: ModelFacts | None) -> TypeGuard[ModelFacts]:
    """Whether it does, or may: of one that is not run it is not known."""
    return facts is not None and facts.makes != "embeddings"


def _shown(
    known: Description, facts: ModelFacts | None, problem: str | None, packed: PackedFolder
) -> dict[str, Any]:
    from sartor.cli.sampling import sampling_values

    entry, stored = known.entry, known.stored
    return {
        "name": known.name,
        "stored": stored and _stored(stored, packed),
        "catalogue": entry
        and {
            "title": entry.title,
            "architecture": entry.architecture,
            "parameters": entry.parameters,
            "license": entry.license,
            "note": entry.note or None,
        },
        "sources": [
            {"ref": str(source.ref), "verified": source.verified} for source in known.sources
        ],
        "file": facts and {**dataclasses.asdict(facts), "path": str(facts.path)},
        "sampling": sampling_values(facts.sampling) if _writes_text(facts) else None,
        "notes": list(facts.notes) if facts else [],
        "problem": problem,
        "now_called": known.now_called,
    }


def _known_facts(known: Description) -> list[tuple[str, str]]:
    """What the catalogue and the store know."""
    entry, stored = known.entry, known.stored
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
    if known.now_called is not None:
        what = f"what is stored is {known.now_called}; sartor pull {known.name} gets today's model"
        facts.append(("note", what))
    if stored is None or stored.pulled_at is not None:
        facts += [("source", _source(source)) for source in known.sources]
    facts += _stored_facts(stored) if stored else [("stored", f"no; sartor pull {known.name}")]
    return facts


def _print_file(facts: ModelFacts) -> None:
    """What the files say, below what the catalogue does."""
    print()
    print_facts(_model_facts(facts))
    print()
    rows = [["FORMAT", "TENSORS", "PARAMETERS", "SIZE"]]
    rows += [
        [share.format, f"{share.tensors}", f"{share.parameters:,}", size(share.bytes)]
        for share in facts.formats
    ]
    print_table(rows)


def _model_facts(facts: ModelFacts) -> list[tuple[str, str]]:
    sizes = [
        f"{what} {count:,}"
        for what, count in (
            ("layers", facts.layers),
            ("width", facts.width),
            ("heads", facts.heads),
            ("of keys and values", facts.kv_heads),
        )
        if count is not None
    ]
    shown = [
        ("architecture", facts.architecture),
        ("runs", f"no: {facts.problem}" if facts.problem else f"yes, makes {facts.makes}"),
        ("parameters", f"{facts.parameters:,}, {facts.bits_per_weight:.2f} bits each"),
        ("sizes", ", ".join(sizes) or "not stated"),
        ("context", f"{facts.context_length:,} tokens" if facts.context_length else "not stated"),
        ("chat template", "yes" if facts.chat_template else "no: it continues text"),
        ("tokenizer", _tokenizer(facts)),
        *((f"token {one.role}", _token(one.id, one.text)) for one in facts.tokenizer.special),
    ]
    if facts.title:
        shown.insert(0, ("title in file", facts.title))
    if facts.makes == "embeddings":
        shown.remove(("chat template", "no: it continues text"))
    if facts.license:
        shown.append(("license in file", facts.license))
    if _writes_text(facts):
        from sartor.graph import describe_sampling

        shown.append(("sampling", describe_sampling(facts.sampling)))
    return [*shown, ("memory", _memory(facts)), *(("note", note) for note in facts.notes)]


def _tokenizer(facts: ModelFacts) -> str:
    found = facts.tokenizer
    if found.problem is not None:
        return f"{found.kind}: cannot be used: {found.problem}"
    bos = "adds bos" if found.adds_bos else "adds no bos"
    return f"{found.kind}; {found.vocab_size:,} tokens, {bos}"


def _token(number: int | None, text: str) -> str:
    return text if number is None else f"{text} ({number})"


def _memory(facts: ModelFacts) -> str:
    needed = facts.memory
    parts = [f"{size(needed.weights_bytes)} of weights"]
    if needed.state_bytes is not None:
        parts.append(f"{size(needed.state_bytes)} for {needed.state_tokens:,} tokens")
    verdict = "fits" if needed.fits else "does not fit"
    return f"{' and '.join(parts)}; {verdict}: {size(needed.available_bytes)} are free now"


def _source(source: Source) -> str:
    return f"{source.ref}{' (verified)' if source.verified else ''}"


def _stored(model: StoredModel, packed: PackedFolder) -> dict[str, Any]:
    return {
        "name": model.name,
        "path": str(model.path),
        "source": model.source,
        "size_bytes": model.size_bytes,
        "packed_bytes": packed.bytes_of(model.path),
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
