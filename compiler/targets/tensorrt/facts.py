"""Limits and preferences of TensorRT's kernels; docs/tensorrt.md says how they were found."""

from __future__ import annotations

from dataclasses import replace

from ....passes.quantize.schemes import Grid, Scheme
from ..base import KernelFacts, Promotion

# Groups of 4-bit codes that a matmul reads as stored.
GROUP_SIZES = (128, 64, 32, 16)
# Below this many numbers in the linears of its layers a model loses more by rounding: finer groups pay.
SMALL_MODEL = 500_000_000

# 8-bit codes have one scale for each output channel: with a scale for each group, the engine would expand the matrix.
_WIDE = Grid("int8")
_SCHEMES = (
    Scheme("int8", Grid("int8"), _WIDE),
    Scheme("int4", Grid("int4", 128), _WIDE, Grid("int4", 32), SMALL_MODEL),
    Scheme("w8a8", Grid("int8", activation="int8"), _WIDE),
    Scheme("fp8", Grid("fp8", activation="fp8"), _WIDE),
)


def _with_limits(scheme: Scheme) -> Scheme:
    return replace(
        scheme, group_sizes=GROUP_SIZES, formats=("int8", "int4", "fp8"), grouped=("int4",), zero_points=False
    )


FACTS = KernelFacts(
    # fp16 has three more bits than bf16; the gate refuses a model whose values exceed its range.
    dtypes=("fp16", "bf16"),
    schemes={scheme.name: _with_limits(scheme) for scheme in _SCHEMES},
    stored=_with_limits(Scheme("stored", None)),
    # A cache update writes from a start on, in numbers of the dtype computed in.
    cache_kinds=("static",),
    promotion=Promotion(Grid("int8"), target_loss=0.02, share=0.275),
    packages={"compile": ("onnx", "onnxruntime"), "run": ()},
)
