"""A plugin of pytest: tests run on the native core that ``SARTOR_SANITIZED_CORE`` names."""

from __future__ import annotations

import importlib.util
import os
import sys

import sartor.backends.cpu

_NAME = "sartor.backends.cpu._native"
_spec = importlib.util.spec_from_file_location(_NAME, os.environ["SARTOR_SANITIZED_CORE"])
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules[_NAME] = _module
_spec.loader.exec_module(_module)
sartor.backends.cpu._native = _module
