"""Copies the example under a name of your own: a package that builds, with your chip's name in it.

    python examples/sartor-example-chip/rename.py mychip ../sartor-mychip

The backend is then called ``mychip``, its classes ``Mychip...``, the distribution ``sartor-mychip``
and the package ``sartor_mychip``. ``--keep-cpu-kernel`` also copies the CPU kernel in C; without it the
package is plain Python.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
SKIPPED = shutil.ignore_patterns("rename.py", "build", "dist", "__pycache__", "*.egg-info", ".*")
TAKEN = {"cpu", "torch", "reference", "null", "auto", "example"}


def renamed(text: str, name: str) -> str:
    """A text of the example with the chip's name in the place of the example's."""
    pairs = {
        "sartor-example-chip": f"sartor-{name}",
        "sartor_example_chip": f"sartor_{name}",
        "SARTOR_EXAMPLE": f"SARTOR_{name.upper()}",
        "examples/sartor-example-chip": f"sartor-{name}",
        "Example": name.capitalize(),
        "example": name,
    }
    # Longest first, and each place once: a name may hold another one.
    pattern = "|".join(sorted(map(re.escape, pairs), key=len, reverse=True))
    return re.sub(pattern, lambda found: pairs[found[0]], text)


def without_kernel(folder: Path, name: str) -> None:
    """Takes the CPU kernel out of a renamed copy, and CMake with it."""
    shutil.rmtree(folder / "native")
    (folder / "CMakeLists.txt").unlink()
    package = folder / "src" / f"sartor_{name}"
    (package / "cpu_kernels.py").unlink()
    (package / "__init__.py").write_text(f'"""A backend for Sartor: {name}."""\n', encoding="utf-8")
    project = folder / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    for pattern, replacement in (
        (r"(?m)^description = .*$", f'description = "A backend for Sartor: {name}."'),
        (r"(?m)^# The two doors: ", "# The door: "),
        (r'(?m)^\[project.entry-points."sartor.cpu_kernels"\]\n.*\n\n', ""),
        (r'(?m)^(requires = \["scikit-build-core[^"]*").*$', r"\1]"),
        (r"(?m)^cmake.build-type = .*$", "wheel.cmake = false"),
    ):
        text, count = re.subn(pattern, replacement, text)
        assert count == 1, pattern
    project.write_text(text, encoding="utf-8")


def readme(name: str, kernel: bool) -> str:
    """What the copy says of itself: the example's README speaks of Sartor's repository."""
    isolation = "--no-build-isolation " if kernel else ""
    return (
        f"# {name} for Sartor\n\n"
        "In an environment that has Sartor, in this folder:\n\n"
        f"```sh\npip install {isolation}.\n```\n\n"
        "```console\n"
        f"$ sartor devices\n$ sartor conformance --backend {name}\n"
        "```\n\n"
        "The contract and the order of work are in `docs/adding-a-chip.md` of Sartor's repository.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="name of the backend: small letters, then digits too")
    parser.add_argument("folder", type=Path, help="where the copy goes; it must not exist yet")
    parser.add_argument("--keep-cpu-kernel", action="store_true", help="with the CPU kernel in C")
    chosen = parser.parse_args()
    name: str = chosen.name
    folder: Path = chosen.folder
    if not re.fullmatch(r"[a-z][a-z0-9]*", name) or name in TAKEN:
        sys.exit(
            f"error: {name!r} cannot be the name of a backend; use small letters and digits, and "
            f"none of {', '.join(sorted(TAKEN))}"
        )
    if folder.exists():
        sys.exit(f"error: {folder} is there already; name a folder that is not")
    shutil.copytree(HERE, folder, ignore=SKIPPED)
    (folder / "src" / "sartor_example_chip").rename(folder / "src" / f"sartor_{name}")
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        path.write_text(renamed(path.read_text(encoding="utf-8"), name), encoding="utf-8")
    if not chosen.keep_cpu_kernel:
        without_kernel(folder, name)
    (folder / "README.md").write_text(readme(name, chosen.keep_cpu_kernel), encoding="utf-8")
    print(f"{folder} has the backend {name}; its README.md says how to install it")


if __name__ == "__main__":
    main()
