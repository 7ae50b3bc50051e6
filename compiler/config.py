"""The options of a compilation, declared once. Imports no torch, so that the command line loads fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..kernels.formats import CACHE_CODE_NAMES
from ..passes.quantize.schemes import PER_CHANNEL, Override
from .options import check_options, invalid, option

DTYPES = ("fp32", "fp16", "bf16")
# Algorithms by scheme; the first is the default.
ALGORITHMS = {
    "int8": ("smoothquant", "rtn", "awq", "gptq"),
    "int4": ("gptq", "rtn", "awq", "smoothquant"),
    "w8a8": ("smoothquant", "rtn", "gptq"),
    "fp8": ("gptq", "rtn", "smoothquant"),
    "nf4": ("rtn", "awq", "gptq"),
}
PRUNE_ALGORITHMS = ("sparsegpt", "wanda")
"""The first is the default."""

_QUANTIZATION, _CALIBRATION, _PRUNING, _CACHE = "Quantization", "Calibration", "Pruning", "KV cache"


@dataclass(frozen=True)
class CompileConfig:
    """All choices of a compilation except the model and the output folder.

    Options of one target alone are in `target_options`: an instance of that target's own dataclass, None for its
    defaults. `overrides` are exceptions for single weights; if several match a weight, the last one counts.
    """

    target: str | None = option(None, "The runtime to compile for.")
    dtype: str | None = option(
        None, "The dtype to compute in.", choices=DTYPES, default_text="the target's: fp32 on CPUs, fp16 on GPUs"
    )
    max_seq_len: int | None = option(
        None, "Longest sequence to serve.", default_text="the model's, 2048 at most", metavar="N", at_least=2
    )
    quantize: str | None = option(
        None,
        "int8, int4, nf4: quantize weights; w8a8, fp8: weights and inputs of linears.",
        choices=tuple(ALGORITHMS),
        section=_QUANTIZATION,
    )
    algo: str | None = option(
        None,
        "The algorithm that quantizes the weights.",
        choices=("rtn", "smoothquant", "awq", "gptq"),
        default_text="by scheme: " + ", ".join(f"{scheme} {algos[0]}" for scheme, algos in ALGORITHMS.items()),
        section=_QUANTIZATION,
    )
    group_size: int | str | None = option(
        None,
        "Input channels that share a scale, or 'channel': all of an output channel.",
        words=(PER_CHANNEL,),
        metavar="N|channel",
        default_text="the scheme's",
        section=_QUANTIZATION,
    )
    raise_share: float | None = option(
        None,
        "With int4, store this share of the weights in 8 bits, the most sensitive first.",
        flag="raise",
        metavar="SHARE",
        default_text="until the predicted loss is small",
        at_least=0,
        at_most=1,
        section=_QUANTIZATION,
    )
    max_kl: float | None = option(
        None,
        "With int4, store as few weights in 8 bits as keep the measured KL divergence from the model under X nats.",
        metavar="X",
        above=0,
        section=_QUANTIZATION,
    )
    calib: str = option(
        "docstrings",
        "Calibration text: a text file, a .jsonl file, or a text that comes with Python: docstrings, topics.",
        metavar="F",
        section=_CALIBRATION,
    )
    calib_samples: int = option(16, "Sequences of the calibration text.", metavar="N", at_least=1, section=_CALIBRATION)
    calib_length: int = option(512, "Tokens of each sequence.", metavar="N", at_least=2, section=_CALIBRATION)
    prune: str | float | None = option(
        None,
        "Set weights of linears to zero: 2:4 is two of each four input channels, 0.5 half of each output channel.",
        metavar="2:4|SHARE",
        section=_PRUNING,
    )
    prune_algo: str | None = option(
        None,
        "The algorithm that chooses the zeros.",
        choices=PRUNE_ALGORITHMS,
        default_text=PRUNE_ALGORITHMS[0],
        section=_PRUNING,
    )
    drop_layers: int = option(
        0, "Leave out the N layers that change their input least.", metavar="N", at_least=0, section=_PRUNING
    )
    kv_cache: str | None = option(
        None,
        "ring: layers with a sliding window keep only that window; static: every layer keeps all positions.",
        choices=("ring", "static"),
        default_text="ring, if the target has it",
        section=_CACHE,
    )
    spec_tokens: int = option(
        0,
        "Let sequences go back by N + 1 positions, for drafts of N tokens: layers that keep only a sliding window keep "
        "N positions more.",
        metavar="N",
        at_least=0,
        at_most=64,
        section=_CACHE,
    )
    kv_cache_dtype: str = option(
        "auto",
        "Format of keys and values: 8 bits, or auto: the dtype computed in.",
        choices=("auto", *CACHE_CODE_NAMES),
        section=_CACHE,
    )
    overrides: tuple[Override, ...] = ()
    target_options: Any = None

    def __post_init__(self) -> None:
        check_options(self)
        self._check_quantization()
        if self.prune is not None:
            parse_sparsity(self.prune)
        elif self.prune_algo is not None:
            raise invalid("prune_algo is set, but nothing is pruned", "Set `prune`, or leave out prune_algo.")

    def _check_quantization(self) -> None:
        if self.quantize is None:
            if given := [n for n in ("algo", "group_size", "raise_share", "max_kl") if getattr(self, n) is not None]:
                raise invalid(f"{given[0]} is set, but weights are not quantized", "Set `quantize`.")
            if self.overrides:
                raise invalid(
                    "There are exceptions for single weights, but weights are not quantized",
                    "Set `quantize`: exceptions only refine a scheme.",
                )
            return
        if self.algo is not None and self.algo not in ALGORITHMS[self.quantize]:
            raise invalid(
                f"algo is {self.algo!r}, which does not work with {self.quantize}",
                f"Choose one of {', '.join(ALGORITHMS[self.quantize])}.",
            )
        if self.raise_share is not None and self.quantize != "int4":
            raise invalid(
                f"raise_share is set, but `quantize` is {self.quantize}", "Leave it out, or set `quantize` to int4."
            )
        if self.max_kl is not None and not (self.quantize == "int4" and self.calibrates):
            hint = "Set `quantize` to int4, and `algo` to one that calibrates: only then can weights get more bits."
            raise invalid("max_kl is set, but no weight can get more bits", hint)
        if self.max_kl is not None and self.raise_share is not None:
            raise invalid("max_kl and raise_share both say how many weights get more bits", "Give one of them.")

    @property
    def algorithm(self) -> str:
        """The algorithm that quantizes the weights."""
        return self.algo or ALGORITHMS[self.quantize or ""][0]

    @property
    def calibrates(self) -> bool:
        """True if quantization uses a calibration text."""
        return self.quantize is not None and self.algorithm != "rtn"

    @property
    def reads_text(self) -> bool:
        """True if anything uses a calibration text."""
        return self.calibrates or self.prune is not None or self.drop_layers > 0

    @property
    def raises(self) -> bool:
        """True if sensitive weights may get more bits; only calibration can tell which they are."""
        return self.quantize == "int4" and self.calibrates and self.raise_share != 0

    @property
    def prune_algorithm(self) -> str:
        """The algorithm that chooses the zeros."""
        return self.prune_algo or PRUNE_ALGORITHMS[0]

    @property
    def cache_codes(self) -> str | None:
        """The format that keys and values are quantized to; None if they are not."""
        return None if self.kv_cache_dtype == "auto" else self.kv_cache_dtype


def parse_sparsity(given: str | float) -> tuple[float, int | None]:
    """Read `prune`: "2:4", or a share between 0 and 1.

    Returns:
        The share of zeros, and the number of consecutive input channels in each of which that share becomes zero.

    Raises:
        UsageError: CONFIG_INVALID for anything else.
    """
    if given == "2:4":
        return 0.5, 4
    try:
        share = float(given)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise invalid(f"prune is {given!r}", "Give 2:4, or a share between 0 and 1.")
    return share, None
