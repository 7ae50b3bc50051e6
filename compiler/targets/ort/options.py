"""Options that only target "ort" has."""

from __future__ import annotations

from dataclasses import dataclass

from ...options import check_options, option

_SECTION = "Target ort"


@dataclass(frozen=True)
class OrtOptions:
    """How the graphs for ONNX Runtime are written."""

    ops: str = option(
        "contrib",
        "contrib: ONNX Runtime's own ops, which are faster; standard: ops of the ONNX standard only.",
        choices=("contrib", "standard"),
        section=_SECTION,
    )
    round_prompts: bool = option(
        True,
        "With int4, quantize the inputs of linears while a prompt is processed, for integer kernels.",
        section=_SECTION,
    )

    def __post_init__(self) -> None:
        check_options(self)
