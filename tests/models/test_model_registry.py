"""The registry, and the page that is generated from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from sartor.models import architectures
from sartor.models.registry import MODEL_FILES
from sartor.models.table import models_page

DOCS = Path(__file__).parents[2] / "docs" / "models.md"


def test_page_is_up_to_date() -> None:
    assert DOCS.read_text(encoding="utf-8") == models_page(), (
        "run: python -m sartor.models.table > docs/models.md"
    )


def test_every_model_file_is_registered_once() -> None:
    entries = architectures()
    assert tuple(entry.name for entry in entries) == MODEL_FILES
    for kind in ("hf_names", "gguf_names"):
        names = [name for entry in entries for name in getattr(entry, kind)]
        assert len(names) == len(set(names))


def test_registry_is_lazy() -> None:
    """Importing the package reads no model file."""
    code = (
        "import sys, sartor.models; "
        "print([n for n in sys.modules if n in ('sartor.models.llama', 'sartor.models.gemma3')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
