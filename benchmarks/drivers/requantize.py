"""Requantises a GGUF file to Q4_0 by llama.cpp. Arguments: the source, the target."""

from __future__ import annotations

import ctypes
import sys

from llama_cpp import llama_cpp as api


def main() -> None:
    params = api.llama_model_quantize_default_params()
    params.ftype = api.LLAMA_FTYPE_MOSTLY_Q4_0
    params.allow_requantize = True
    source, target = (argument.encode() for argument in sys.argv[1:3])
    code = api.llama_model_quantize(source, target, ctypes.byref(params))
    if code:
        sys.exit(f"llama_model_quantize returned {code}")


if __name__ == "__main__":
    main()
