"""What TensorRT can't do, refused before any work on weights."""

from __future__ import annotations

from collections.abc import Collection

import torch

from ....errors import LlmcError
from ....ir.nodes import value_of
from ....ir.program import Program, where
from ....kernels.ops import attention
from ....passes.queries import is_op
from ....runtimes.cuda.libcuda import open_driver
from ....runtimes.engines.tensorrt.library import find_library
from .config import check_sms
from .options import TensorRtOptions
from .preflight import check_dtypes, check_size
from .triton_server import check_library


def check_machine(options: TensorRtOptions, dtypes: Collection[str]) -> None:
    """Refuse an engine that can't be built here.

    Args:
        dtypes: the quantization scheme, and the dtype to compute in.

    Raises:
        LlmcError: TENSORRT_MISSING, TENSORRT_VERSION, SERVER_PLAN_MISSING, TRT_SM_UNSUPPORTED or TRT_UNSUPPORTED.
    """
    sms, library = wanted_sms(options), find_library(options.library)
    if options.export:
        check_library(library.name)
    check_sms(library, sms)
    check_dtypes(dtypes, sms)


def check_attentions(program: Program) -> None:
    """Refuse a program with attentions that no kernel computes.

    Raises:
        LlmcError: TRT_UNSUPPORTED, naming the layer.
    """
    for node in program.nodes:
        if is_op(node, attention):
            call = attention.bind(node.args, dict(node.kwargs))
            head_dim = max(int(value_of(call[name]).shape[3]) for name in ("k", "v"))
            subject = f"The attention of {where(node) or 'the model'}"
            check_size(head_dim, program.max_seq_len, subject)
            _check_dtype(value_of(call["k"]).dtype, program, subject)


def _check_dtype(dtype: torch.dtype, program: Program, subject: str) -> None:
    """Refuse keys that are wider than the weights: a cache update writes numbers of the dtype computed in."""
    narrow = {weight.dtype for weight in program.weights.values()} & {torch.float16, torch.bfloat16}
    if narrow and dtype not in narrow:
        names = " and ".join(sorted(str(one).removeprefix("torch.") for one in narrow))
        raise LlmcError(
            "TRT_UNSUPPORTED",
            f"{subject} computes in {str(dtype).removeprefix('torch.')}, and the weights are in {names}.",
            "Store the model's buffers in the dtype of its weights, or compile it for another target.",
        )


def wanted_sms(options: TensorRtOptions) -> list[str]:
    """Return the compute capabilities to build for: as given, else that of this machine's GPU, else 8.9."""
    if options.sm is not None:
        return options.sms
    try:
        return [open_driver().device.sm]
    except LlmcError:
        return ["8.9"]
