"""Quantize a GGUF file with llama.cpp, in llama.cpp's environment.

Usage: `python quantize_gguf.py SOURCE TARGET FORMAT`.
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp as lib


def main() -> None:
    source, target, name = sys.argv[1:]
    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{name}")
    if status := lib.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        raise SystemExit(f"llama_model_quantize returned {status} for {source}")


if __name__ == "__main__":
    main()
