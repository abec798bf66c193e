"""Adapters of served models: loaded and dropped while requests run, and back after a crash."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

from sartor.serving.errors import ApiError, invalid, unavailable
from sartor.serving.frontend import ServedModel
from sartor.serving.messages import AdapterLoaded, AdapterSpec, DropAdapter, LoadAdapter, ToWorker
from sartor.serving.names import lookup
from sartor.serving.shown_paths import without_folders
from sartor.serving.supervisor import Supervisor

logger = logging.getLogger(__name__)


class Adapters:
    """Which adapters there are, and those on their way into the worker.

    ``folder`` is where those lie that clients may load; None lets them load none. All methods
    run on the event loop's thread.
    """

    def __init__(
        self, models: dict[str, ServedModel], supervisor: Supervisor, folder: Path | None
    ) -> None:
        self._models = models
        self._supervisor = supervisor
        self._folder = folder
        self._loading: dict[tuple[str, str], asyncio.Future[str | None]] = {}
        self._retired: dict[str, tuple[ServedModel, AdapterSpec]] = {}

    def find(self, name: str) -> tuple[ServedModel, AdapterSpec] | None:
        for model in self._models.values():
            if name in model.adapters:
                return model, model.adapters[name]
        return None

    def paths(self) -> Iterator[str]:
        """Of all files and folders that messages of a worker may name."""
        for model in self._models.values():
            yield from (model.spec.path, model.spec.cache or "")
            yield from (spec.path for spec in model.adapters.values())
        yield from (spec.path for _, spec in self._retired.values())
        yield "" if self._folder is None else str(self._folder.resolve())

    async def load(self, model: ServedModel, name: str, path: str) -> None:
        """Loads an adapter from the folder. Raises ApiError where that is not possible."""
        if self._folder is None:
            raise ApiError(
                403,
                "this server loads no adapters on request; start it with --adapter-folder",
                code="adapters_disabled",
            )
        if not name.isprintable():
            raise invalid(
                "lora_name: the name has characters that cannot be shown; choose another",
                "lora_name",
            )
        if lookup(self._models, name) is not None:
            raise invalid(f"lora_name: {name!r} is in use; drop it first", "lora_name")
        if name in self._retired:
            raise invalid(
                f"lora_name: requests still run with the adapter {name!r} that was dropped; "
                "wait for them, or choose another name",
                "lora_name",
            )
        folder = _inside(self._folder, path)
        if folder is None:
            raise invalid(
                f"lora_path: {path[:200]!r} is no folder in the server's adapter folder",
                "lora_path",
            )
        if self._supervisor.phase != "ready":
            raise unavailable("the worker is not ready; try again soon", retry_after=5)
        spec = AdapterSpec(name, str(folder))
        future: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        if self._loading.setdefault((model.name, name), future) is not future:
            raise invalid(f"lora_name: {name!r} is being loaded", "lora_name")
        try:
            self._send(LoadAdapter(model.name, spec))
            error = await future
        finally:
            del self._loading[model.name, name]
        if error is not None:
            logger.warning("a client's adapter was not loaded: %s", error)
            raise invalid(without_folders(error, [spec.path, *self.paths()]), "lora_path")
        model.adapters[name] = spec
        self._remember()

    def drop(self, name: str, in_use: bool) -> None:
        """No new request gets it. Those that run with it (``in_use``) finish, also where a worker
        dies meanwhile. Raises ApiError 404."""
        found = self.find(name)
        if found is None:
            raise ApiError(404, f"there is no adapter {name!r}", code="adapter_not_found")
        model, spec = found
        del model.adapters[name]
        if in_use:
            self._retired[name] = model, spec
        self._remember()
        self._send(DropAdapter(model.name, name))

    def unused(self, name: str) -> None:
        """The last request that ran with an adapter has ended."""
        retired = self._retired.pop(name, None)
        if retired is not None:
            self._remember()
            # A worker that was started since then has it for the requests that it took over.
            self._send(DropAdapter(retired[0].name, name))

    def loaded(self, message: AdapterLoaded) -> None:
        """The worker's word."""
        future = self._loading.get((message.model, message.name))
        if future is not None and not future.done():
            future.set_result(message.error)

    def worker_died(self) -> None:
        """What was on its way is lost; what was there comes back with the next worker."""
        for future in self._loading.values():
            if not future.done():
                future.set_result("the worker died while it loaded the adapter; try again")

    def _send(self, message: ToWorker) -> None:
        self._supervisor.send(message)

    def _remember(self) -> None:
        specs = []
        for model in self._models.values():
            retired = [spec for owner, spec in self._retired.values() if owner is model]
            specs.append(model.hosted(retired))
        self._supervisor.host(specs)


def _inside(folder: Path, path: str) -> Path | None:
    """The folder of that path below ``folder``; None where there is none."""
    try:
        found = (folder / path).resolve()
        return found if found.is_relative_to(folder.resolve()) and found.is_dir() else None
    except (OSError, ValueError):  # too long, or with a NUL in it
        return None
