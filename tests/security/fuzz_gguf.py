"""A coverage-guided fuzzer of the GGUF reader.

With atheris, where it is installed, else with a search of its own: an input that reaches a line, or
a jump between lines, that none did before is kept and changed further.

    python tests/security/fuzz_gguf.py --seconds 600
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

import mutations

sys.path.append(str(Path(__file__).parents[2] / "build" / "fuzzers"))  # make test-marked

from sartor.errors import SartorError
from sartor.formats import gguf, gguf_blocks, gguf_strings
from sartor.formats.gguf import GgufCheckpoint

CORPUS = Path(__file__).with_name("corpus") / "gguf"
MOST_BYTES = 8192
_WATCHED = frozenset(module.__file__ for module in (gguf, gguf_blocks, gguf_strings))


def read(content: bytes, path: Path) -> None:
    """What a user of the checkpoint could ask for; everything but a SartorError is a finding."""
    path.write_bytes(content)
    try:
        with GgufCheckpoint(path) as checkpoint:
            for key in checkpoint.metadata:
                str(checkpoint.metadata[key]).encode()
            for name in checkpoint.names():
                weight = checkpoint.weight(name)
                assert weight.data.size == checkpoint.info(name).size
            assert len(checkpoint.identity()) == 64
    except SartorError:
        pass


def edges_of(content: bytes, path: Path) -> set[tuple[int, int, int]]:
    """Runs the reader; file, line before and line of every step inside it."""
    found: set[tuple[int, int, int]] = set()

    def step(frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        if code.co_filename not in _WATCHED:
            return None
        here, before = hash(code.co_filename), frame.f_lineno

        def line(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal before
            found.add((here, before, frame.f_lineno))
            before = frame.f_lineno
            return line

        return line

    sys.settrace(step)
    try:
        read(content, path)
    finally:
        sys.settrace(None)
    return found


def search(seconds: float, seed: int, most: int = sys.maxsize) -> tuple[int, int]:
    """Changes inputs for that long, or that often; how many were run, and how many were kept."""
    rng = random.Random(seed)
    inputs = [file.read_bytes() for file in sorted(CORPUS.iterdir())]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        known = set().union(*(edges_of(content, path) for content in inputs))
        end, runs = time.monotonic() + seconds, 0
        while time.monotonic() < end and runs < most:
            content = _changed(rng.choice(inputs), rng)[:MOST_BYTES]
            began = time.monotonic()
            found = edges_of(content, path)
            assert time.monotonic() - began < 5, f"slow: {content.hex()}"
            runs += 1
            if not found <= known:
                known |= found
                inputs.append(content)
    return runs, len(inputs)


def _changed(content: bytes, rng: random.Random) -> bytes:
    try:
        places = mutations.gguf_numbers(content)
    except (KeyError, IndexError):  # it is damaged already
        places = []
    if not places or rng.random() < 0.5:
        return mutations.any_bytes(content, rng) if content else b"GGUF"
    for _ in range(rng.randint(1, 3)):
        content = mutations.with_number(content, *rng.choice(places), rng)
    return content


def _atheris(seconds: int) -> None:
    import atheris

    path = Path(tempfile.mkdtemp()) / "m.gguf"
    modules = (gguf, gguf_blocks, gguf_strings)
    places: list[Any] = list(modules)
    for module in modules:
        own = [value for value in vars(module).values() if isinstance(value, type)]
        places += [kind for kind in own if kind.__module__ == module.__name__]
    names = {module.__name__ for module in modules}
    for place in places:
        for name, value in list(vars(place).items()):
            if isinstance(value, FunctionType) and value.__module__ in names:
                setattr(place, name, atheris.instrument_func(value))
    found = Path(tempfile.mkdtemp())
    options = [f"-max_total_time={seconds}", f"-max_len={MOST_BYTES}", "-timeout=5"]
    atheris.Setup([sys.argv[0], *options, str(found), str(CORPUS)], lambda data: read(data, path))
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--own", action="store_true", help="without atheris, also where it is")
    options = parser.parse_args()
    if not options.own:
        try:
            import atheris  # noqa: F401
        except ImportError:
            pass
        else:
            _atheris(options.seconds)
            return
    runs, kept = search(options.seconds, options.seed)
    print(f"{runs} inputs, {kept} kept")


if __name__ == "__main__":
    main()
