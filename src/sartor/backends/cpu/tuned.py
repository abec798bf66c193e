"""What was measured of kernels on this machine, kept as data: one file a device."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sartor.backends.base import KernelTiming
from sartor.backends.cpu import _native
from sartor.backends.cpu.packing import LAYOUT_VERSION
from sartor.hardware import cpu_name

VERSION = 1
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TunedDevice:
    """What a timing depends on beside its layer; ``module`` tells builds of the kernels apart."""

    cpu: str
    isa: str
    threads: int
    layout: int
    module: str

    @classmethod
    def here(cls, isa: str, threads: int) -> TunedDevice:
        file = os.stat(_native.__file__)
        module = f"{file.st_size} bytes of {file.st_mtime_ns}"
        return cls(cpu_name(), isa, threads, LAYOUT_VERSION, module)

    @property
    def key(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]


class _File(msgspec.Struct):
    version: int
    device: TunedDevice
    timings: list[KernelTiming]


class TunedStore:
    """The timings of one device. Nothing here is ever an error: what cannot be read is measured
    again, and what cannot be written is forgotten with the process."""

    def __init__(self, folder: Path, device: TunedDevice) -> None:
        self._device = device
        self._writable = True
        self.path = folder / f"{device.key}.json"

    def read(self) -> list[KernelTiming]:
        """What is known; nothing where the file is missing, damaged or another device's."""
        try:
            file = msgspec.json.decode(self.path.read_bytes(), type=_File)
        except FileNotFoundError:
            return []
        except (OSError, msgspec.MsgspecError, ValueError) as error:
            _LOG.warning("%s: %s; kernels are measured again", self.path, error)
            return []
        known = file.version == VERSION and file.device == self._device
        return file.timings if known else []

    def add(self, timings: Sequence[KernelTiming]) -> None:
        """Puts timings in the place of older ones of the same layers and rows."""
        if not self._writable:
            return
        layers = {timing.layer for timing in timings}
        # Read again: another process may have added others.
        kept = [timing for timing in self.read() if timing.layer not in layers]
        data = msgspec.json.encode(_File(VERSION, self._device, [*kept, *timings]))
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(data)
            part.replace(self.path)
        except OSError as error:
            _LOG.warning("%s: %s; what was measured is not kept", self.path, error)
            self._writable = False
            with contextlib.suppress(OSError):
                part.unlink()
