"""What the user may decide about a compilation, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import LlmcError
from ..passes.base import Pass
from ..passes.pipeline import engine_passes
from ..passes.quantize import SCHEMES, Scheme

TARGETS = ("ort",)
OPS = ("contrib", "standard")
KV_CACHES = ("ring", "static")


@dataclass(frozen=True)
class CompileConfig:
    """All choices of a compilation but the model and where the artifact goes.

    Attributes:
        target: the runtime: "ort".
        dtype: what to compute in.
        quantize: the scheme of the weights, None to leave them: "int8", "int4" or "w8a8".
        group_size: weights that share a scale in int4; the scheme's own where None.
        kv_cache: "ring" lets layers with a sliding window keep that window only, "static" keeps all positions.
        max_seq_len: the longest sequence to serve; the model's own where None, 2048 at most.
        ops: "contrib", ONNX Runtime's own, or "standard", those of the ONNX standard alone.
    """

    target: str = "ort"
    dtype: str = "fp32"
    quantize: str | None = None
    group_size: int | None = None
    kv_cache: str = "ring"
    max_seq_len: int | None = None
    ops: str = "contrib"

    def __post_init__(self) -> None:
        self._one_of("target", TARGETS)
        self._one_of("ops", OPS)
        self._one_of("kv_cache", KV_CACHES)
        if self.quantize is not None:
            self._one_of("quantize", tuple(SCHEMES))
        if self.dtype != "fp32":
            raise LlmcError(
                "DTYPE_SLOW",
                f"ONNX Runtime has no {self.dtype} matmul on CPUs: it would convert to fp32 and back around each.",
                "Compile with --dtype fp32; --int8 and --int4 make it smaller and faster.",
            )
        if self.group_size is not None and self.quantize != "int4":
            raise _invalid("group_size belongs to int4", "Leave it out, or quantize to int4.")
        if self.group_size is not None and self.group_size not in (16, 32, 64, 128, 256):
            raise _invalid(f"group_size is {self.group_size}", "Choose 16, 32, 64, 128 or 256.")

    @property
    def scheme(self) -> Scheme | None:
        """How weights are rounded."""
        if self.quantize is None:
            return None
        chosen = SCHEMES[self.quantize]
        return replace(chosen, group_size=self.group_size) if self.group_size else chosen

    @property
    def precision(self) -> str:
        """The row of the gate's limits that applies."""
        return self.quantize or self.dtype

    @property
    def rounds_prefill(self) -> bool:
        """Whether many tokens at once go through integer kernels that the step graph does without."""
        return self.ops == "contrib" and self.quantize in ("int8", "int4")

    def engine_passes(self) -> list[Pass]:
        """What turns an optimized program into one that a back end lowers, in order."""
        return engine_passes(self.scheme, ring=self.kv_cache == "ring", fuse=self.ops == "contrib")

    def _one_of(self, name: str, choices: Sequence[str]) -> None:
        if getattr(self, name) not in choices:
            raise _invalid(f"{name} is {getattr(self, name)!r}", f"Choose one of {', '.join(choices)}.")


def _invalid(what: str, hint: str) -> LlmcError:
    return LlmcError("CONFIG_INVALID", f"{what[0].upper()}{what[1:]}.", hint)
