"""Adds a GGUF file's tokenizer to the checkpoint folder of the same model.

Arguments: the file, the folder. Needs transformers and gguf, and nothing of Sartor.
"""

from __future__ import annotations

import sys
from pathlib import Path

import transformers


def main() -> None:
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        str(source.parent), gguf_file=source.name
    )
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
