"""Commands as processes: pipes, signals and the time to start."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-c", "from sartor.cli.main import main; main()"]


def start(*arguments: object, **more: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=more.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )


def heed_interrupts() -> None:
    """A shell that runs the tests in the background makes its children ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_a_closed_pipe_ends_quietly(tiny: Path) -> None:
    process = start("run", tiny, "hello", "--max-tokens", 2000)
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    # The model may end before it notices; then all is well.
    assert (process.wait(60), err) == (1, "") or process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error(tiny: Path) -> None:
    with open("/dev/full", "w") as full:
        code, _, err = finish(start("run", tiny, "hello", "--json", stdout=full.fileno()))
    assert code == 1
    assert err.startswith("error: ")
    assert "No space left" in err
    assert err.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux'")
def test_threads_that_cannot_be_had_are_an_error(tiny: Path) -> None:
    """Their stacks do not fit; the pool is native code, which must not end the process."""

    def limit() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    command = [*COMMAND, "run", str(tiny), "hello", "--threads", "2000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=limit)
    assert done.returncode == 1
    assert done.stderr.startswith("error: only ")
    assert "of 2000 threads could be started" in done.stderr
    assert "; lower --threads, or raise" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_a_closed_output_is_an_error() -> None:
    shell = ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, "list"]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == (
        "error: standard output is closed; redirect it to a file or to /dev/null\n"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_an_interrupt_is_one_line(tiny: Path) -> None:
    process = start(
        *("run", tiny, "hello", "--max-tokens", 2000, "--backend", "null"),
        *("--device", "null-20ms", "--temperature", 0),
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert (code, err) == (1, "error: interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_an_interrupted_pull_leaves_no_half_model(home: Path) -> None:
    process = start("pull", "hf:some/model")
    assert process.stderr is not None
    first = process.stderr.readline()
    assert "pulling hf:some/model" in first
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
    assert not list(home.glob("models/*"))


def test_help_starts_quickly() -> None:
    """It must not import what it does not need; the time itself depends on the machine."""
    probe = (
        "import sys; from sartor.cli.main import guarded; guarded(['--help']); "
        "heavy = {'numpy', 'rich', 'fastapi', 'tokenizers', 'jinja2', 'sartor.store', "
        "'sartor.engine', 'sartor.graph'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: sartor" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX accounting")
def test_first_token_of_a_stored_model(model_files: dict[str, Path]) -> None:
    """From the start of the process to the first token in 1.5 s, counted in processor time:
    that is what the program can help, whatever else the machine does."""
    import resource

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    def seconds() -> float:
        before = spent()
        model = model_files["smollm2-135m"]
        assert finish(start("run", model, "Hello", "--max-tokens", 1, "--threads", 1))[0] == 0
        return spent() - before

    seconds()  # packs the weights
    assert min(seconds() for _ in range(3)) < 1.5
