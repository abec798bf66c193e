"""fuzz_native_door.cpp: some thousand random programs, and a minute of clang's libFuzzer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "native"))

from replaying import ROOT, build_beside_module, build_runner

HERE = Path(__file__).parent
SOURCE = HERE / "fuzz_native_door.cpp"
CORPUS = HERE / "corpus" / "native_door"
NATIVE = ROOT / "src" / "sartor" / "native"
FLAGS = ["-std=c++20", "-g", "-pthread", f"-I{NATIVE / 'core'}", f"-I{NATIVE / 'include'}"]
SANITIZED = ["-O1", "-ffp-contract=off", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
PARTS = ("executor", "executor_attention", "executor_linear", "executor_state", "program_check")
"""What libFuzzer looks into; the kernels are those that the sanitizers' own test compiles."""

RANDOM = 20_000
SECONDS = 60


@pytest.mark.timeout(900)  # a build, on a machine that may be busy
def test_random_programs_are_run_or_refused(tmp_path: Path) -> None:
    library = build_beside_module().with_name("libsartor_core.a")
    program = tmp_path / "replay"
    _run(
        os.environ.get("CXX", "c++"),
        *FLAGS,
        "-O1",
        "-DSARTOR_REPLAY",
        SOURCE,
        library,
        "-o",
        program,
    )
    files = sorted(CORPUS.iterdir())
    assert len(files) > 20
    done = _run(program, RANDOM, *files)
    assert done.stdout == f"{len(files)} files and {RANDOM} random programs\n"


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_libfuzzer_finds_nothing(tmp_path: Path) -> None:
    clang = _clang(tmp_path)
    folder = "replay-address-undefined"
    kernels = build_runner(folder, "-DSARTOR_PYTHON=OFF", "-DSARTOR_SANITIZE=address,undefined")
    objects = []
    for part in PARTS:
        objects.append(tmp_path / f"{part}.o")
        source = NATIVE / "core" / f"{part}.cpp"
        _run(
            clang, *FLAGS, *SANITIZED, "-fsanitize=fuzzer-no-link", "-c", source, "-o", objects[-1]
        )
    fuzzer = tmp_path / "fuzzer"
    library = kernels.with_name("libsartor_core.a")
    _run(clang, *FLAGS, *SANITIZED, "-fsanitize=fuzzer", SOURCE, *objects, library, "-o", fuzzer)
    found = tmp_path / "found"
    found.mkdir()
    # What is found lies in build/, to be looked at, and to be added to the corpus.
    artifacts = ROOT / "build" / "fuzz-native"
    artifacts.mkdir(exist_ok=True)
    done = subprocess.run(
        [
            *(fuzzer, found, CORPUS, f"-artifact_prefix={artifacts}/"),
            *(f"-max_total_time={SECONDS}", "-timeout=5", "-rss_limit_mb=4096", "-max_len=600"),
        ],
        env={
            **os.environ,
            "ASAN_OPTIONS": ":".join(
                (
                    *(
                        "detect_leaks=0",
                        "allocator_may_return_null=1",
                        "max_allocation_size_mb=1000",
                    ),
                    # Its stacks are not aligned as the kernels of another compiler rely on.
                    "detect_stack_use_after_return=0",
                )
            ),
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        },
        capture_output=True,
        text=True,
        errors="replace",
    )
    assert done.returncode == 0, done.stderr[-8000:]


def _clang(folder: Path) -> str:
    """A clang with libFuzzer, the newest first; skips where there is none."""
    names = [os.environ.get("CXX", ""), *(f"clang++-{n}" for n in range(25, 14, -1)), "clang++"]
    source, program = folder / "try.cpp", folder / "try"
    source.write_text(
        '#include <cstddef>\n#include <cstdint>\nextern "C" int LLVMFuzzerTestOneInput('
        "const uint8_t *, size_t) { return 0; }\n"
    )
    for name in names:
        if "clang" in name and shutil.which(name):
            command = [name, "-std=c++20", "-fsanitize=address,fuzzer", source, "-o", program]
            if subprocess.run(command, capture_output=True).returncode == 0:
                return name
    pytest.skip(
        "no clang with libFuzzer; install one (Debian: apt-get install clang-19 libclang-rt-19-dev)"
    )


def _run(*command: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    return done
