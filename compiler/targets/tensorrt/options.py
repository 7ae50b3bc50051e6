"""Options that only target "trt" has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ...options import check_options, invalid, option

_SECTION = "Target trt"


@dataclass(frozen=True)
class TensorRtOptions:
    """The engines that are built from the neutral artifact."""

    sm: str | None = option(
        None,
        "Compute capabilities of the GPUs to build an engine for, such as 8.9,12.0.",
        metavar="LIST",
        default_text="that of this machine's GPU, else 8.9",
        section=_SECTION,
    )
    library: Literal["tensorrt_rtx", "tensorrt"] | None = option(
        None,
        "The library that builds and runs the engine: TensorRT for RTX, or TensorRT for data centres.",
        choices=("tensorrt_rtx", "tensorrt"),
        default_text="the one that is installed",
        section=_SECTION,
    )
    max_batch_size: int = option(
        8,
        "The most sequences of a decode step.",
        metavar="N",
        at_least=2,
        at_most=1024,
        section=_SECTION,
    )
    max_prompt_tokens: int = option(
        512, "The most tokens of a prompt in one call; longer prompts take several.", metavar="N", at_least=2,
        section=_SECTION,
    )  # fmt: skip
    engine: bool = option(
        True,
        "Build an engine now; otherwise `llmc finalize DIR` builds one on the machine that runs it.",
        section=_SECTION,
    )
    export: Literal["triton-server"] | None = option(
        None,
        "Also write a model folder for another server into DIR/triton-server; needs TensorRT for data centres.",
        choices=("triton-server",),
        section=_SECTION,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.export and not self.engine:
            raise invalid("export is set, but no engine is built", "Leave out one of them.")
        for sm in self.sms:
            if not re.fullmatch(r"\d{1,2}\.\d", sm):
                raise invalid(f"sm is {self.sm!r}", "Give compute capabilities such as 8.9 or 8.9,12.0.")

    @property
    def sms(self) -> list[str]:
        """The given compute capabilities one by one."""
        return [sm.strip() for sm in self.sm.split(",")] if self.sm is not None else []
