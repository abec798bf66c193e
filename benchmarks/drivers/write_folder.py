"""Writes a GGUF file's weights as a bf16 checkpoint folder, for engines that read no GGUF.

Arguments: the file, the folder. Needs transformers, torch and gguf, and nothing of Sartor.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers


def main() -> None:
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(source.parent),
        gguf_file=source.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # The weights are plain now; with the memory of where they came from none can be saved.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)


if __name__ == "__main__":
    main()
