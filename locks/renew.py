"""Writes the locks: every package that a list of pyproject.toml brings, with version and hashes.

    python locks/renew.py                 keep each version that still fits pyproject.toml
    python locks/renew.py --upgrade       take the newest of each
    python locks/renew.py --lowest FILE   the lowest that build, program and tests allow

There is one file for each list: ``build.txt`` (what the build needs), ``app.txt`` (what the program
needs) and one for each extra. All come from one resolution, so that they can be installed together,
and hold for every Python and system that the packages know. torch has a file without hashes,
``unhashed.txt``: its builds for different hardware carry the same version, and each brings its own
libraries.

The work is uv's, which the extra ``dev`` installs. It asks the index that uv is configured with.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
OLDEST_PYTHON = "3.11"
# triton comes with the builds of torch that use it, in the version that they need.
WITHOUT_TORCH = ("--no-emit-package=torch", "--no-emit-package=triton")


def lists() -> dict[str, list[str]]:
    """The lists of pyproject.toml by the names of their locks."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        settings = tomllib.load(file)
    project = settings["project"]
    return {
        "build": settings["build-system"]["requires"],
        "app": project["dependencies"],
        **project["optional-dependencies"],
    }


def pins() -> str:
    """What the locks have now, without hashes: versions that a new resolution prefers."""
    lines = {
        line.removesuffix("\\").strip()
        for lock in FOLDER.glob("*.txt")
        for line in lock.read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    return "".join(f"{line}\n" for line in sorted(lines))


def renew(*, upgrade: bool) -> None:
    """Writes all locks, and removes those of lists that are no longer there."""
    wanted = lists()
    with tempfile.TemporaryDirectory() as folder:
        together = Path(folder) / "together.txt"
        together.write_text("" if upgrade else pins(), encoding="utf-8")
        everything = [line for lines in wanted.values() for line in lines]
        compile_list(everything, together, "--universal", "--python-version", OLDEST_PYTHON)
        for lock in FOLDER.glob("*.txt"):
            lock.unlink()
        for name, lines in wanted.items():
            compile_list(
                lines,
                FOLDER / f"{name}.txt",
                *("--universal", "--python-version", OLDEST_PYTHON, "--generate-hashes"),
                *("--constraints", str(together), *WITHOUT_TORCH),
            )
        (torch,) = (
            line for line in together.read_text().splitlines() if line.startswith("torch==")
        )
    (FOLDER / "unhashed.txt").write_text(
        f"# Which build of it is taken, pip's settings decide.\n{torch}\n", encoding="utf-8"
    )


def lowest(target: Path, python: str) -> None:
    """Writes the lowest versions of what build, program and tests name, for one Python."""
    wanted = lists()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # uv would keep its versions
    names = ("build", "app", "test")
    compile_list(
        [line for name in names for line in wanted[name]],
        target,
        *("--resolution", "lowest-direct", "--python", python, *WITHOUT_TORCH),
    )


def compile_list(requirements: list[str], target: Path, *options: str) -> None:
    """Resolves requirements with uv into a file. Ends the program where uv fails: it says why."""
    uv = Path(sysconfig.get_path("scripts")) / "uv"
    done = subprocess.run(
        [
            *(uv, "pip", "compile", "-", "--quiet", "--output-file", target, "--no-annotate"),
            *("--custom-compile-command", "make update", "--no-emit-index-url", *options),
        ],
        input="".join(f"{line}\n" for line in requirements),
        text=True,
        cwd=ROOT,  # whose pyproject.toml tells what torch needs
    )
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions")
    parser.add_argument("--lowest", metavar="FILE", type=Path, help="write the lowest versions")
    parser.add_argument("--python", default=sys.executable, help="for which Python, with --lowest")
    chosen = parser.parse_args()
    if chosen.lowest:
        lowest(chosen.lowest, chosen.python)
    else:
        renew(upgrade=chosen.upgrade)


if __name__ == "__main__":
    main()
