"""Recorded cases under the sanitizers: no access out of bounds, no undefined behaviour, no race."""

from __future__ import annotations

from pathlib import Path

import pytest
from replaying import build_runner, replay, right_paths

from sartor.backends.cpu import _native

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]  # the kernels take minutes to compile


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_every_path_is_clean(sanitizers: str, recorded: Path) -> None:
    """What a sanitizer finds goes to standard error, or ends the runner."""
    folder = f"replay-{sanitizers.replace(',', '-')}"
    runner = build_runner(folder, f"-DSARTOR_SANITIZE={sanitizers}")
    done = replay(runner, recorded, seconds=1800)
    assert done.stderr == ""
    assert right_paths(done) == _native.usable_paths()
