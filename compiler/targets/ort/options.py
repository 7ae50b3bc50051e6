"""Options that only target "ort" has."""

from __future__ import annotations

from dataclasses import dataclass

from ...options import check_options, invalid, option

_SECTION = "Target ort"


@dataclass(frozen=True)
class OrtOptions:
    """How the graphs for ONNX Runtime are written."""

    device: str = option(
        "cpu",
        "cpu: float32 on CPUs; cuda: half precision on NVIDIA GPUs.",
        choices=("cpu", "cuda"),
        section=_SECTION,
    )
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
        if self.device == "cuda" and self.ops == "standard":
            raise invalid(
                "ops is standard and device is cuda",
                "Leave out ops: without ONNX Runtime's own ops, a GPU would expand codes and scores in every step.",
            )
