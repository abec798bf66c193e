"""``sartor serve``: models over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sartor.cli import options, presets
from sartor.cli.settings import settings_of
from sartor.progress.line import ProgressLine
from sartor.serving.limits import ServerLimits


def serve(
    call: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Models to serve.", show_default=False),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    max_requests: Annotated[
        int, typer.Option(min=1, help="Requests that may be unfinished at once.")
    ] = 1024,
    max_wait: Annotated[
        float,
        typer.Option(
            min=0,
            help="Turn requests away that would wait longer for their first token, in seconds by "
            "estimate; 0 takes all.",
        ),
    ] = 300,
    max_sequences: Annotated[
        int, typer.Option(min=1, help="Sequences that run at once in one batch.")
    ] = 64,
    memory: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="Memory that weights, state, scratch and the worker may take, like 3GB or 512MiB.",
            show_default=False,
        ),
    ] = "",
    alias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=MODEL", help="Another name for a served model (may be repeated)."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="A LoRA adapter that requests name as the model."),
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A preset of sartor.toml that requests name as the model."
        ),
    ] = None,
    adapter_folder: Annotated[
        Path | None,
        typer.Option(help="Let clients load adapters that lie in this folder.", show_default=False),
    ] = None,
    special_in_text: options.SpecialInText = False,
    log: Annotated[
        Literal["text", "json", "none"], typer.Option(help="A line for each request, in this form.")
    ] = "text",
    log_file: Annotated[
        Path | None,
        typer.Option(help="Where these lines go, if not to standard error.", show_default=False),
    ] = None,
    log_client: Annotated[
        bool, typer.Option("--log-client", help="With the address of the client in them.")
    ] = False,
    otel: Annotated[
        bool | None,
        typer.Option(
            "--otel/--no-otel",
            help="Send spans to OpenTelemetry; on where OTEL_EXPORTER_OTLP_ENDPOINT is set.",
            show_default=False,
        ),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(help="File of API keys, made with `sartor keys`.", show_default=False),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A web page's origin that may ask from a browser."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Another name of this server, for a server without keys; * allows any.",
        ),
    ] = None,
    max_seconds: Annotated[
        float, typer.Option(min=0, help="Longest time for a request; 0 sets no limit.")
    ] = ServerLimits.request_seconds,
    max_prompt_tokens: Annotated[
        int, typer.Option(min=0, help="Longest prompt; 0 takes what the model's context holds.")
    ] = 0,
    max_tokens: Annotated[
        int, typer.Option(min=0, help="Longest answer; 0 takes what the model's context holds.")
    ] = 0,
    max_body_bytes: Annotated[
        int, typer.Option(min=1, help="Largest body of a request.")
    ] = ServerLimits.body_bytes,
    max_connections: Annotated[
        int, typer.Option(min=1, help="Connections open at once.")
    ] = ServerLimits.connections,
    max_peer_connections: Annotated[
        int,
        typer.Option(
            min=1,
            help="Connections of one address, at most half of all. Behind a proxy on one address, "
            "raise both.",
        ),
    ] = ServerLimits.peer_connections,
    key_part: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=1,
            help="Of several keys, how much one may have of what they share: prompts that wait, "
            "bytes that are read, places for work.",
        ),
    ] = ServerLimits.key_part,
    threads: options.Threads = 0,
    context: options.Context = 0,
    backend: options.Backend = "auto",
    device: options.Device = "auto",
    kv: options.Kv = "bf16",
    activation: options.Activation = "int8",
    head_bits: options.HeadBits = 0,
    isa: options.Isa = "auto",
    tune: options.Tune = True,
) -> int:
    """Serve models over an OpenAI-compatible HTTP API."""
    from sartor.cli.serve_screen import show
    from sartor.serving.server import serve as run_server
    from sartor.serving.telemetry import Telemetry
    from sartor.store import sartor_home

    models, named = presets.served(settings_of(call), models, preset or ())
    plan = options.make_plan(
        threads=threads,
        context=context,
        backend=backend,
        device=device,
        kv=kv,
        activation=activation,
        head_bits=head_bits,
        isa=isa,
        max_sequences=max_sequences,
        tune=tune,
    )
    return run_server(
        models,
        host=host,
        port=port,
        plan=plan,
        cache=sartor_home() / "packed",
        max_requests=max_requests,
        max_wait=max_wait,
        adapters=options.adapters(adapter),
        aliases=options.aliases(alias),
        adapter_folder=adapter_folder,
        presets=named,
        special_in_text=special_in_text,
        memory_bytes=options.size(memory) if memory else None,
        telemetry=Telemetry(log, log_file, log_client, otel),
        keys=keys,
        cors_origins=cors_origin or (),
        allowed_hosts=allowed_host or (),
        limits=ServerLimits(
            request_seconds=max_seconds,
            prompt_tokens=max_prompt_tokens,
            max_tokens=max_tokens,
            body_bytes=max_body_bytes,
            # What one may bring, several may bring at once.
            bodies_bytes=max(ServerLimits.bodies_bytes, 4 * max_body_bytes),
            connections=max_connections,
            peer_connections=max_peer_connections,
            key_part=key_part,
        ),
        progress=ProgressLine(),
        announce=show,
    )
