"""Limits and preferences of ONNX Runtime's kernels.

Those for CPUs are measured in docs/performance.md. Those for GPUs follow from the kernels that its CUDA provider has;
docs/decisions.md lists them.
"""

from __future__ import annotations

from ....kernels.formats import CACHE_CODE_NAMES
from ....passes.quantize.schemes import Grid, Scheme
from ..base import InputExemption, KernelFacts, Promotion

# MatMulNBits takes powers of two from 16 on.
GROUP_SIZES = (256, 128, 64, 32, 16)
# The groups that its kernels read fastest, fastest first.
FASTEST_GROUPS = (128, 64, 32, 16, 256)
# GroupQueryAttention takes heads whose size is a multiple of 8, and rotates 8 pairs at once.
HEAD_MULTIPLE = 8
# Flash attention on GPUs takes heads up to this size.
LARGEST_HEAD_ON_CUDA = 256
# Quantizing inputs pays from this many tokens per call on. Below, a matmul mostly waits for weights, and a short prompt
# is answered before the second graph would be open.
PREFILL_TOKENS = 64
# The same for calls of several sequences, tokens of all of them together: their graph is soon open.
BATCH_TOKENS = 6
# Below this many numbers in the linears of its layers a model loses more by rounding, and its short matmuls are bound
# by other costs than the kernel's work on groups: finer groups pay.
SMALL_MODEL = 500_000_000
# Older releases lack kernels that the lowering uses; a later major release may change what an op means.
REQUIRES = {"onnxruntime": ">=1.30,<2"}

_WIDE = Grid("int8", 128)
_SCHEMES = (
    Scheme("int8", Grid("int8", 128), _WIDE),
    Scheme("int4", Grid("int4", 128), _WIDE, Grid("int4", 32, symmetric=False), SMALL_MODEL),
    Scheme("w8a8", Grid("int8", activation="int8"), _WIDE),
    Scheme("fp8", Grid("fp8", activation="fp8"), _WIDE),
    Scheme("nf4", Grid("nf4", 64), _WIDE),
)

FACTS = KernelFacts(
    # No fp16 or bf16 matmul on CPUs: each would convert to fp32 and back.
    dtypes=("fp32",),
    schemes={
        s.name: Scheme(s.name, s.linears, s.wide, s.small, s.small_below, group_sizes=GROUP_SIZES) for s in _SCHEMES
    },
    stored=Scheme("stored", None, group_sizes=GROUP_SIZES),
    cache_codes=CACHE_CODE_NAMES,
    # Integer kernels take one scale per output channel in the prefill graph too.
    promotion=Promotion(Grid("int8"), target_loss=0.02, share=0.275),
    packages={"compile": ("onnx",), "run": ("onnxruntime",)},
    emulated={
        "fp8": "No kernel of target ort computes in FP8 on a CPU: `quantize` fp8 is for checking quality there, and "
        "runs in float32. `quantize` w8a8 is the scheme with 8-bit kernels for weights and inputs."
    },
    where=" with `device` cpu",
)
CUDA_FACTS = KernelFacts(
    # fp16 has three more bits than bf16; the gate refuses a model whose values exceed its range.
    dtypes=("fp16", "bf16"),
    schemes={name: FACTS.schemes[name] for name in ("int8", "int4", "nf4")},
    stored=FACTS.stored,
    # GroupQueryAttention writes position p to place p.
    cache_kinds=("static",),
    promotion=Promotion(Grid("int8", 128), target_loss=0.02, share=0.275),
    packages=FACTS.packages,
    refused={
        "w8a8": "ONNX Runtime's CUDA provider has no matmul of 8-bit integers that takes their scales, and `quantize` "
        "w8a8 needs it",
        "fp8": "ONNX Runtime's CUDA provider multiplies in FP8 only with one scale for a whole matrix, and `quantize` "
        "fp8 has one for each channel and token",
    },
    where=" with `device` cuda",
)
# Linears that keep exact inputs run slower in the prefill graph.
INPUT_EXEMPTION = InputExemption(target_loss=0.003, share=0.15)
