"""Runs a script that needs llama-cpp-python, in a process and environment of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

from sartor.errors import SartorError


def ask(python: str, script: str, request: Mapping[str, object]) -> str:
    """What a script beside this one answers on standard output to a JSON request.

    SartorError where it fails.
    """
    command = [python, str(Path(__file__).with_name(script))]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise SartorError(
            f"llama.cpp failed with code {done.returncode} ({' '.join(last)}); name an "
            "interpreter that has llama-cpp-python with --python"
        )
    return done.stdout
