from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.append(str(ROOT / "benchmarks"))
sys.path.append(str(ROOT / "tests" / "serving"))  # tiny_model
