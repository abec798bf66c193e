"""``sartor keys``: who may use a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

keys = typer.Typer(
    help="Make, list and revoke API keys for `sartor serve --keys FILE`.", no_args_is_help=True
)
File = Annotated[Path, typer.Argument(metavar="FILE", help="The keys file.", show_default=False)]
Name = Annotated[str, typer.Argument(help="Name of the key.", show_default=False)]


@keys.command()
def add(
    file: File,
    name: Name,
    share: Annotated[
        float, typer.Option(help="Weight beside other keys: twice the share, twice the tokens.")
    ] = 1.0,
    priority: Annotated[int, typer.Option(help="Requests of higher priority run first.")] = 0,
    max_streams: Annotated[
        int, typer.Option(min=0, help="Answers under way at once; 0 sets no limit.")
    ] = 0,
    requests_per_minute: Annotated[
        int, typer.Option(min=0, help="Requests a minute; 0 sets no limit.")
    ] = 0,
    tokens_per_minute: Annotated[
        int, typer.Option(min=0, help="Tokens a minute, prompts included; 0 sets no limit.")
    ] = 0,
    intake_seconds_per_minute: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds a minute for reading its requests, refused ones too; 0 sets no limit.",
        ),
    ] = 0.0,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model that the key may ask for; all where none is named."),
    ] = None,
    group: Annotated[
        str, typer.Option(help="Keys of one group share cached prompts; others never do.")
    ] = "",
    admin: Annotated[
        bool, typer.Option("--admin", help="Let it load and unload adapters.")
    ] = False,
    metrics: Annotated[
        bool,
        typer.Option(
            "--metrics", help="Let it see all metrics, not only those of its own requests."
        ),
    ] = False,
) -> int:
    """Make a key, print it once, and keep its hash in FILE."""
    import msgspec

    from sartor.errors import UsageError
    from sartor.serving.keys import ApiKey, add_key

    def make(sha256: str) -> ApiKey:
        fields = {
            "name": name,
            "sha256": sha256,
            "share": share,
            "priority": priority,
            "max_streams": max_streams,
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
            "intake_seconds_per_minute": intake_seconds_per_minute,
            "models": model or [],
            "group": group,
            "admin": admin,
            "metrics": metrics,
        }
        try:
            return msgspec.convert(fields, ApiKey)
        except msgspec.ValidationError as error:
            raise UsageError(f"keys add: {error}") from None

    print(add_key(file, make))
    return 0


@keys.command("list")
def list_keys(
    file: File,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Show who has a key, and what it allows."""
    import msgspec

    from sartor.serving.keys import read_keys

    shown = [
        {name: value for name, value in msgspec.structs.asdict(key).items() if name != "sha256"}
        for key in read_keys(file)
    ]
    if json:
        print(msgspec.json.encode({"keys": shown}).decode())
        return 0
    for entry in shown:
        name = entry.pop("name")
        said = ", ".join(f"{what} {_plain(value)}" for what, value in entry.items() if value)
        print(f"{name}: {said}")
    return 0


@keys.command()
def revoke(file: File, name: Name) -> int:
    """Remove a key; servers that run with FILE refuse it from their next request on."""
    from sartor.serving.keys import revoke_key

    revoke_key(file, name)
    return 0


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(value)
    return "yes" if value is True else f"{value:g}" if isinstance(value, float) else str(value)
