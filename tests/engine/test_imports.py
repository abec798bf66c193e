from __future__ import annotations

import subprocess
import sys


def test_the_engine_imports_nothing_heavy() -> None:
    """The first token of `sartor run` is due in 1.5 seconds from the start of the process."""
    heavy = ("tokenizers", "jinja2", "torch", "transformers", "huggingface_hub", "fastapi")
    code = f"import sys, sartor.engine.llm; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
