from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

SERVING = Path(__file__).parents[1] / "serving"
sys.path.append(str(SERVING))  # server_process, raw_client, tiny_model

_spec = importlib.util.spec_from_file_location("serving_fixtures", SERVING / "conftest.py")
assert _spec is not None
assert _spec.loader is not None
_serving = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_serving)

tiny_model = _serving.tiny_model
api_server = _serving.api_server
start_server = _serving.start_server
