"""The entry point: runs a command and turns whatever happens into one line and an exit code.

It imports next to nothing, so that even an interrupt during the start ends in order.
"""

from __future__ import annotations

import gc
import os
import sys


def main() -> None:
    """``sartor``: exits with 0 when done, 1 when failed, 2 for wrong usage."""
    # A start makes some hundred thousand objects that stay: looking through them for garbage
    # every 700 new ones took a tenth of it.
    gc.set_threshold(50_000, 20, 100)
    # Texts are encoded one by one. The library's threads would have nothing to do, and where the
    # system refuses them it writes pages about it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(guarded(sys.argv[1:]))


def guarded(arguments: list[str]) -> int:
    """Runs one command; returns the exit code, and lets no exception through."""
    debug = False
    try:
        from sartor.cli.app import dispatch, take_debug

        debug, arguments = take_debug(arguments)
        _ready_streams()
        status = dispatch(arguments)
        sys.stdout.flush()
        _finish_threads()
        return status
    except KeyboardInterrupt:
        _let_interrupts_kill()
        if sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write("\n")  # the terminal shows ^C in the middle of a line
        return _fail("interrupted", 1, debug)
    except BrokenPipeError:
        # Whoever read the output has gone (`sartor ... | head -1`): nobody is left to tell.
        _forget_output()
        return 1
    except Exception as error:
        _forget_output()
        return _fail(*_explain(error, next(iter(arguments), "")), debug)


def _explain(error: Exception, command: str) -> tuple[str, int]:
    """The line and the exit code for an error."""
    from sartor.errors import SartorError

    if isinstance(error, SartorError):
        from sartor.cli.spelling import spelling

        return error.spelled(spelling(command)), error.exit_code
    # Typer's exceptions for wrong usage; their base class lives elsewhere in each of its versions.
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "sartor"
        message = str(error.format_message()).strip().rstrip(".")
        return f"{message}; `{command} --help` tells more", int(error.exit_code)
    if isinstance(error, OSError) and error.strerror:
        place = error.filename or "reading or writing failed"
        return f"{place}: {error.strerror}; --debug shows where", 1
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return (
            "the system gives no further thread; use fewer --threads, or raise the limits of this "
            "process on memory and threads (ulimit -v, ulimit -u)"
        ), 1
    if isinstance(error, MemoryError):
        return "out of memory; free some, or choose a smaller model or --context", 1
    from sartor.store.redacted import redacted

    detail = redacted(" ".join(str(error).split()))
    return (
        f"unexpected {type(error).__name__}: {detail}; this is a fault in sartor: "
        "run again with --debug and report what it shows"
    ), 1


def _fail(message: str, code: int, debug: bool) -> int:
    if sys.stderr is None:
        return code
    try:
        from sartor.printable import plain, printable  # a file's own texts may be in the message

        if debug:
            import traceback

            from sartor.store.redacted import redacted

            print(printable(redacted(traceback.format_exc())), end="", file=sys.stderr)
        print(f"error: {plain(' '.join(message.split()))}", file=sys.stderr, flush=True)
    except OSError:
        _forget_output()
    return code


def _ready_streams() -> None:
    """Standard streams that work whatever the shell has made of them.

    One that is closed becomes /dev/null: the next file that is opened would get its number, and
    whatever is written there would end in that file. An answer may hold characters that the
    terminal's encoding lacks; they must not stop it.
    """
    from sartor.errors import SartorError

    closed = sys.stdout is None
    _open_closed()
    if closed:
        raise SartorError("standard output is closed; redirect it to a file or to /dev/null")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace" if stream is sys.stderr else "replace")


def _open_closed() -> None:
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    while null <= 2:
        null = os.dup(null)
    os.close(null)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8"))


def _finish_threads() -> None:
    """Waits for files that are being written beside the answer, where an interrupt is caught."""
    import threading

    mine = threading.current_thread()
    open_threads = [t for t in threading.enumerate() if t is not mine and not t.daemon]
    if not open_threads:
        return
    from sartor.progress import showing
    from sartor.progress.line import ProgressLine

    with showing(ProgressLine(), "keeping the packed weights for the next start"):
        for thread in open_threads:
            thread.join()


def _let_interrupts_kill() -> None:
    """Files under way are completed before the exit; who interrupts once more does not wait."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _forget_output() -> None:
    """What is left in a broken output's buffer would raise again when Python ends."""
    try:
        sys.stdout.flush()
    except (AttributeError, OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (AttributeError, OSError, ValueError):
                if stream is not None:
                    os.dup2(null, stream.fileno())


if __name__ == "__main__":
    main()
