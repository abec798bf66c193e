"""``sartor serve``: the gateway process, from model names to the end of the last answer."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import math
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from sartor.engine.preset import Preset
from sartor.errors import SartorError, UsageError
from sartor.plan import ExecutionPlan
from sartor.printable import plain
from sartor.serving.addresses import bind, is_public, listen, room_for, url, urls
from sartor.serving.app import create_app
from sartor.serving.frontend import ServedModel, open_served_model
from sartor.serving.gateway import Gateway
from sartor.serving.hosts import Hosts, check_hosts
from sartor.serving.http_protocol import BoundedProtocol, Peers, keep_sweeping
from sartor.serving.intake import Intake
from sartor.serving.keys import KeyFile
from sartor.serving.lifecycle import Timing
from sartor.serving.limits import ServerLimits
from sartor.serving.log_lines import log_to_stderr, say
from sartor.serving.shown_paths import served_names_of
from sartor.serving.startup import (
    Started,
    add_adapters,
    add_aliases,
    add_presets,
    check_adapters,
    check_origins,
)
from sartor.serving.telemetry import Sink, Telemetry
from sartor.store.manifest import StoredModel
from sartor.store.progress import Progress
from sartor.store.store import ModelStore

Announce = Callable[[Started], None]


def serve(
    models: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    plan: ExecutionPlan | None = None,
    cache: Path | None = None,
    max_requests: int = 1024,
    max_wait: float = 0.0,
    timing: Timing | None = None,
    adapters: Mapping[str, Path] | None = None,
    adapter_folder: Path | None = None,
    presets: Sequence[Preset] = (),
    aliases: Mapping[str, str] | None = None,
    special_in_text: bool = False,
    telemetry: Telemetry | None = None,
    memory_bytes: int | None = None,
    limits: ServerLimits | None = None,
    keys: Path | None = None,
    cors_origins: Sequence[str] = (),
    allowed_hosts: Sequence[str] = (),
    store: ModelStore | None = None,
    progress: Progress | None = None,
    announce: Announce | None = None,
) -> int:
    """Serves models until a signal comes; the exit status is 0 after a drain, 1 when cut short.

    models        catalogue names, paths or other references that the store knows
    port          0 takes a free one; the ready line names it
    cache         folder of packed weights; None keeps none
    adapters      LoRA adapters of the (only) model, by the names that requests use
    presets       served under their names beside the models; one that names a model needs that one
    adapter_folder  where adapters lie that clients may load; None lets them load none
    aliases       further names that requests may use, each with the model that it stands for
    special_in_text  whether control tokens that messages of a chat spell become those tokens
    max_requests  prompts that may be unfinished at once; further ones get status 429
    max_wait      seconds that a request may wait for its first token, by estimate; one that would
                  wait longer gets status 429. 0: however long
    memory_bytes  of the device that weights, state, scratch and the worker itself may take; the
                  state of sequences gets what the others leave. None: no limit
    telemetry     what is logged and traced of requests; None: nothing
    keys          file of API keys, of which every request needs one; None lets everybody ask
    cors_origins  web pages that may ask from a browser, like https://example.org
    allowed_hosts  further names of this server, for clients of one without keys; * is any name
    announce      is called when the server is ready; None prints the ready line

    Blocks. The first SIGINT or SIGTERM lets answers finish and turns new requests away (503); a
    second one stops at once. Raises SartorError where a model cannot be found, read or loaded, or
    the port is taken; what can be checked without a model is checked before there is any.
    """
    if not models:
        raise UsageError("serve: name at least one model, for example smollm2:135m")
    if not math.isfinite(max_wait) or max_wait < 0:
        raise UsageError(f"serve: max_wait is {max_wait}; it must be a number, and 0 takes all")
    log_to_stderr()
    plan = plan or ExecutionPlan()
    limits = limits or ServerLimits()
    limits = dataclasses.replace(limits, connections=room_for(limits.connections))
    key_file = None if keys is None else KeyFile(keys)

    def part() -> float:
        return limits.key_part if key_file is not None and len(key_file) > 1 else 1.0

    check_adapters(adapters or {}, adapter_folder)
    check_origins(cors_origins)
    check_hosts(allowed_hosts)
    with (
        (telemetry or Telemetry()).open() as sinks,
        contextlib.closing(bind(host, port)) as listener,
    ):
        store = store or ModelStore()
        served = _open(models, plan, cache, store, progress)
        _check_context(plan.max_context, list(served.values()))
        for model in served.values():
            model.special_in_text = special_in_text
        add_adapters(served, adapters or {})
        add_presets(served, presets, store)
        add_aliases(served, aliases or {})
        if keys is None and is_public(listener):
            say(
                f"warning: other machines may reach {url(listener)}, and whoever does can use it: "
                "there are no API keys. Make some with `sartor keys add FILE NAME` and start with "
                "--keys FILE, or leave --host away"
            )

        def make_gateway() -> Gateway:
            return Gateway(
                list(served.values()),
                timing=timing,
                max_requests=max_requests,
                max_wait=max_wait,
                adapter_folder=adapter_folder,
                memory_bytes=memory_bytes,
                answers_bytes=limits.answers_bytes,
                part=part,
            )

        listen(listener)
        # What is there now stays: a collection that looked through it would hold up every stream.
        # Then what requests leave behind can be collected in small portions.
        gc.freeze()
        gc.set_threshold(5_000, 10, 10)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(
                _serve(
                    make_gateway,
                    listener,
                    limits,
                    part,
                    key_file,
                    cors_origins,
                    Hosts.of(listener, host, allowed_hosts),
                    sinks,
                    announce or _print_ready_line,
                )
            )


def _open(
    models: Sequence[str],
    plan: ExecutionPlan,
    cache: Path | None,
    store: ModelStore,
    progress: Progress | None,
) -> dict[str, ServedModel]:
    """The models by name, from wherever they are. Raises SartorError."""
    found: dict[str, tuple[str, StoredModel]] = {}
    for reference in models:
        stored = store.ensure(reference, progress)
        if stored.name in found:
            raise UsageError(f"serve: the model {stored.name} is named twice; name it once")
        found[stored.name] = reference, stored
    in_place = [stored for _, stored in found.values() if stored.pulled_at is None]
    shown = served_names_of(
        [stored.path for stored in in_place],
        [
            {name for own, (typed, _) in found.items() if own != s.name for name in (own, typed)}
            for s in in_place
        ],
    )
    names = dict(zip((stored.name for stored in in_place), shown, strict=True))
    served: dict[str, ServedModel] = {}
    for reference, stored in found.values():
        # Clients see no folders of this machine.
        name = names.get(stored.name, stored.name)
        model = open_served_model(name, stored.path, plan, cache)
        # What the user typed works in requests too: "./m.gguf", or a name without its tag.
        model.aliases = frozenset({reference, stored.name})
        served[name] = model
    return served


def _print_ready_line(started: Started) -> None:
    print(plain(started.ready_line), flush=True)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where there is one: it takes a fifth off what a token costs the gateway
    (benchmarks/serve.py)."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _check_context(asked: int, served: Sequence[ServedModel]) -> None:
    """One of several models may be made for shorter texts than the plan allows, but not all."""
    short = [model for model in served if model.context_length < asked]
    if not short:
        return
    limits = ", ".join(
        f"{model.name} has a limit of its own of {model.context_length} tokens" for model in short
    )
    if len(short) == len(served):
        raise UsageError(
            f"plan: max_context is {asked}, but {limits}; give at most that, or leave it out to "
            "get it",
            fields=("max_context",),
        )
    say(f"note: {limits}, less than the context asked for")


async def _serve(
    make_gateway: Callable[[], Gateway],
    listener: socket.socket,
    limits: ServerLimits,
    part: Callable[[], float],
    keys: KeyFile | None,
    cors_origins: Sequence[str],
    hosts: Hosts,
    sinks: Sequence[Sink],
    announce: Announce,
) -> int:
    gateway = make_gateway()
    intake = Intake(gateway.models, limits, part)
    config = uvicorn.Config(
        create_app(gateway, intake, keys=keys, cors_origins=cors_origins, hosts=hosts, sinks=sinks),
        http=functools.partial(BoundedProtocol, limits, Peers(limits)),  # type: ignore[arg-type]
        ws="none",
        timeout_keep_alive=limits.idle_seconds,  # type: ignore[arg-type]
        log_config=None,  # its messages go where ours do
        log_level="error",  # what clients do wrong is for them to know
        access_log=False,
        lifespan="off",
    )
    server = _Server(config, gateway)

    def make_started() -> Started:
        return Started(
            tuple(urls(listener)),
            tuple(gateway.models.values()),
            gateway.hosted,
            None if keys is None else len(keys),
            gateway.memory_bytes,
        )

    announcement = asyncio.create_task(_settle(server, gateway, make_started, announce))
    sweeping = asyncio.create_task(keep_sweeping(server.server_state.connections))
    gateway.start()
    try:
        server.serving = asyncio.create_task(server.serve(sockets=[listener]))
        await server.serving
        if server.failure:
            raise SartorError(server.failure)
        return 0
    except asyncio.CancelledError:
        if not server.cut_short:
            raise
        return 1
    finally:
        announcement.cancel()
        sweeping.cancel()
        await gateway.close()
        await intake.close()


async def _settle(
    server: _Server, gateway: Gateway, make_started: Callable[[], Started], announce: Announce
) -> None:
    """Waits for the worker's first word. A model that cannot be loaded now was none to start the
    server with, and ends it; one that is lost later does not."""
    say(f"Loading {', '.join(gateway.models)} ...")
    for model in gateway.models.values():
        for note in model.sampling.notes:
            say(f"note: {note}")
    await gateway.settled()
    if failure := gateway.failure():
        server.failure = f"the server cannot start: {failure}"
        gateway.draining = True
        return
    with contextlib.suppress(OSError):  # whoever read standard output has gone
        announce(make_started())


class _Server(uvicorn.Server):
    """Uvicorn with our way to end: any second signal cuts answers short."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        super().__init__(config)
        self.serving: asyncio.Task[None] | None = None
        self.cut_short = False
        self.failure = ""
        self._gateway = gateway
        self._loop = asyncio.get_running_loop()

    async def on_tick(self, counter: int) -> bool:
        # Until the last answer somebody listens: who asks now shall hear why, and /health says
        # so to balancers. Uvicorn waits for what is then still on its way to clients.
        if self._gateway.draining and not self._gateway.unfinished:
            self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not passed on: uvicorn would raise the signal again after the drain, and the exit
        # status would be the signal's.
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self._gateway.draining:
            self.cut_short = True
            if self.serving is not None:
                self.serving.cancel()
            return
        self._gateway.draining = True
        if count := self._gateway.unfinished:
            say(f"Stopping after {count} unfinished requests; once more stops at once")
