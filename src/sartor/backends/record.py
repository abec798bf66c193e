"""Records the conformance suite for machines without Python.

``python -m sartor.backends.record FILE`` writes every case of the suite: the program as the CPU
backend translates it, its packed weights, the step, what the reference makes of it, and how far
off a result may be. ``sartor_replay FILE`` (native/runner/replay.cpp) runs them on each
instruction-set path of the machine that it stands on. The format is that of
native/core/recording.hpp; no processor and no path has a part in it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sartor.backends import conformance
from sartor.backends.cpu.backend import CpuBackend, CpuExecutable
from sartor.backends.reference.backend import ReferenceBackend


def recordings(cases: Iterable[conformance.Case]) -> Iterator[bytes]:
    """Each case as bytes; a file of cases has them one after the other."""
    cpu, reference = CpuBackend(), ReferenceBackend()
    for case in cases:
        case = conformance.fitted(case, cpu.capabilities("cpu"))
        expected, _, _ = conformance.execute(reference, case, "reference")
        executable, batch = conformance.prepare(cpu, case, "cpu")
        assert isinstance(executable, CpuExecutable)
        name = f"{case.operator} {case.format}"
        yield executable.record(batch, name, case.tolerance, expected)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sartor.backends.record")
    parser.add_argument("file", type=Path, help="where the cases go")
    options = parser.parse_args(arguments)
    try:
        with options.file.open("wb") as file:
            sizes = [file.write(case) for case in recordings(conformance.cases())]
    except OSError as error:
        print(f"error: {options.file}: {error.strerror}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(sizes)} cases in {options.file}, {sum(sizes) >> 10} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
