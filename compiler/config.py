"""What the user may decide about a compilation, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..errors import LlmcError, UsageError
from ..kernels.ops.quantized import CACHE_CODES
from ..passes.base import Pass
from ..passes.pipeline import engine_passes
from ..passes.quantize.rounding_plan import GROUPS, PER_CHANNEL, SCHEMES_BY_NAME, Override, Scheme
from .compress.calibration_text import CalibrationText
from .compress.prune_linears import PRUNE_ALGOS
from .compress.sparsity import Sparsity

TARGETS = ("ort",)
OPS = ("contrib", "standard")
KV_CACHES = ("ring", "static")
KV_CACHE_DTYPES = ("auto", *CACHE_CODES)
# Which algorithm rounds where none is asked for: the first is the default.
ALGOS = {
    "int8": ("smoothquant", "rtn", "awq", "gptq"),
    "int4": ("gptq", "rtn", "awq", "smoothquant"),
    "w8a8": ("smoothquant", "rtn", "gptq"),
    "fp8": ("gptq", "rtn", "smoothquant"),
    "nf4": ("rtn", "awq", "gptq"),
}


@dataclass(frozen=True)
class CompileConfig:
    """All choices of a compilation but the model and where the artifact goes.

    Attributes:
        target: the runtime: "ort".
        dtype: what to compute in.
        quantize: the scheme of the weights, None to leave them: "int8", "int4", "w8a8", "fp8" or "nf4".
        algo: what rounds them: "rtn" (to the nearest), "smoothquant", "awq" or "gptq"; the scheme's own where None.
        group_size: weights that share a scale, or "channel"; the scheme's own where None.
        overrides: weights that become something else than the scheme says; the last one that fits counts.
        calibration: the text that the algorithm looks at.
        raise_share: in int4, of all numbers of linears, the share that get 8 bits because they are worth it; by default
            as many as a small loss takes, a third at most.
        prune: "2:4" or the share of each weight that becomes zero, before anything is rounded; None: none.
        prune_algo: what chooses the zeros, "sparsegpt" or "wanda"; "sparsegpt" where None.
        drop_layers: how many layers are left out, those that do least.
        round_prompts: in int4, many tokens at once go through integer kernels, which round inputs of linears by row;
            False: through those of a single token, which are exacter and slower.
        max_kl: the divergence from the model, in nats a token, that the artifact must stay under as it is measured.
        kv_cache: "ring" lets layers with a sliding window keep that window only, "static" keeps all positions.
        kv_cache_dtype: what keys and values are kept as: "int8" or "fp8" with a scale for each head of each token, or
            "auto", the dtype computed in.
        max_seq_len: the longest sequence to serve; the model's own where None, 2048 at most.
        ops: "contrib", ONNX Runtime's own, or "standard", those of the ONNX standard alone.
    """

    target: str = "ort"
    dtype: str = "fp32"
    quantize: str | None = None
    algo: str | None = None
    group_size: int | str | None = None
    overrides: tuple[Override, ...] = ()
    calibration: CalibrationText = field(default_factory=CalibrationText)
    raise_share: float | None = None
    round_prompts: bool = True
    max_kl: float | None = None
    prune: str | float | None = None
    prune_algo: str | None = None
    drop_layers: int = 0
    kv_cache: str = "ring"
    kv_cache_dtype: str = "auto"
    max_seq_len: int | None = None
    ops: str = "contrib"

    def __post_init__(self) -> None:
        self._one_of("target", TARGETS)
        self._one_of("ops", OPS)
        self._one_of("kv_cache", KV_CACHES)
        self._one_of("kv_cache_dtype", KV_CACHE_DTYPES)
        if self.quantize is not None:
            self._one_of("quantize", tuple(SCHEMES_BY_NAME))
            if self.algo is not None:
                self._one_of("algo", ALGOS[self.quantize])
        elif self.algo or self.overrides:
            raise _invalid("nothing is quantized", "Choose a scheme for what is not said otherwise: int8 or int4.")
        if self.dtype != "fp32":
            raise UsageError(
                "DTYPE_SLOW",
                f"ONNX Runtime has no {self.dtype} matmul on CPUs: it would convert to fp32 and back around each.",
                "Compile with --dtype fp32; --int8 and --int4 make it smaller and faster.",
            )
        if self.group_size is not None and self.quantize not in ("int8", "int4", "nf4"):
            raise _invalid("group_size belongs to int8, int4 and nf4", "Leave it out, or choose one of them.")
        if self.group_size is not None and self.group_size not in (*GROUPS, PER_CHANNEL):
            raise _invalid(
                f"group_size is {self.group_size}", f"Choose {', '.join(map(str, GROUPS))} or {PER_CHANNEL}."
            )
        if self.raise_share is not None and not (self.quantize == "int4" and 0 <= self.raise_share <= 1):
            raise _invalid(f"raise_share is {self.raise_share}", "Give 0 to 1, with int4.")
        if not self.round_prompts and not (self.quantize == "int4" and self.ops == "contrib"):
            raise _invalid("round_prompts is False", "Leave it out: only int4 with --ops contrib rounds prompts.")
        if self.max_kl is not None and not (self.quantize == "int4" and self.algorithm != "rtn" and self.max_kl > 0):
            hint = (
                "Give a number above 0, with int4 and an algorithm that calibrates: only then are there bits to raise."
            )
            raise _invalid(f"max_kl is {self.max_kl}", hint)
        if self.max_kl is not None and self.raise_share is not None:
            raise _invalid("max_kl and raise_share both say how many weights get more bits", "Give one of them.")
        if self.prune is not None:
            Sparsity.parse(self.prune)  # which refuses what is no pattern
        if self.prune_algo is not None:
            self._one_of("prune_algo", PRUNE_ALGOS)
            if self.prune is None:
                raise _invalid("prune_algo is about pruned weights", "Say how many become zero: prune.")
        if self.drop_layers < 0:
            raise _invalid(f"drop_layers is {self.drop_layers}", "Give 0 or more.")
        if self.scheme is not None:  # which refuses what is no grid
            assert self.algorithm

    @property
    def scheme(self) -> Scheme | None:
        """How weights are rounded."""
        if self.quantize is None:
            return None
        chosen = SCHEMES_BY_NAME[self.quantize]
        if self.group_size is None or chosen.linears is None:
            return chosen
        return replace(chosen, linears=replace(chosen.linears, group=self.group_size), small=None)

    @property
    def algorithm(self) -> str:
        """What rounds the weights."""
        return self.algo or ALGOS[self.quantize or ""][0]

    @property
    def sparsity(self) -> Sparsity | None:
        """Which weights become zero."""
        return None if self.prune is None else Sparsity.parse(self.prune)

    @property
    def prune_algorithm(self) -> str:
        """What chooses the zeros."""
        return self.prune_algo or PRUNE_ALGOS[0]

    @property
    def calibrates(self) -> bool:
        """Whether rounding looks at a text."""
        return self.quantize is not None and self.algorithm != "rtn"

    @property
    def reads_text(self) -> bool:
        """Whether anything looks at a text."""
        return self.calibrates or self.prune is not None or self.drop_layers > 0

    @property
    def raises(self) -> bool:
        """Whether weights that are worth it get more bits; only calibration can tell which."""
        return self.quantize == "int4" and self.algorithm != "rtn" and self.raise_share != 0

    @property
    def rounds_prefill(self) -> bool:
        """Whether many tokens at once go through integer kernels though the scheme leaves inputs as they are."""
        return self.ops == "contrib" and self.quantize == "int4" and self.round_prompts

    @property
    def cache_codes(self) -> str | None:
        """What keys and values are rounded to, None where they are not."""
        return None if self.kv_cache_dtype == "auto" else self.kv_cache_dtype

    def engine_passes(self, rounding: Sequence[Pass] = ()) -> list[Pass]:
        """What turns an optimized program into one that a back end lowers, in order, `rounding` in its place."""
        return engine_passes(
            rounding, ring=self.kv_cache == "ring", fuse=self.ops == "contrib", cache_codes=self.cache_codes
        )

    def _one_of(self, name: str, choices: Sequence[str]) -> None:
        if getattr(self, name) not in choices:
            raise _invalid(f"{name} is {getattr(self, name)!r}", f"Choose one of {', '.join(choices)}.")


def _invalid(what: str, hint: str) -> LlmcError:
    return UsageError("CONFIG_INVALID", f"{what[0].upper()}{what[1:]}.", hint)
