from __future__ import annotations

import pytest

from sartor.backends.registry import choose
from sartor.errors import SartorError


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that computes; the CPU's only where its native module is built."""
    name: str = request.param
    try:
        choose(name)
    except SartorError as error:
        pytest.skip(str(error))
    return name
