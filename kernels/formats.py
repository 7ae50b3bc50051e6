"""Names of the number formats that ops, passes and options share. Imports nothing, so that options load fast."""

from __future__ import annotations

FLOAT8_NAMES = ("fp8", "fp8_e5m2")
"""E4M3 and E5M2."""

SCHEMES = ("int8", "int4", "nf4", *FLOAT8_NAMES)
"""Formats of a quantized weight; `kernels/ops/quantized.py` defines what their codes mean."""

ACTIVATIONS = ("none", "int8", *FLOAT8_NAMES)
"""Formats that a linear's input may be quantized to."""

CACHE_CODE_NAMES = ("int8", "fp8")
"""Formats of a KV cache in 8 bits."""
