"""The compiler's public functions, each on one screen."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..errors import LlmcError
from ..passes.pipeline import run_pipeline
from .frontend.capture import trace
from .frontend.sources import find_source
from .ir.program import Program
from .ir.stages import Stage
from .ir.weights import cast

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEFAULT_MAX_SEQ_LEN = 2048


def capture(
    model: str | Path | nn.Module,
    *,
    dtype: str = "fp32",
    max_seq_len: int | None = None,
    until: Stage = Stage.CANONICAL,
    dump_ir: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Program:
    """Capture a causal language model as a canonical program; no weight is read.

    Args:
        model: a hub id, a folder of safetensors, a GGUF file, a module in memory, or "demo".
        dtype: what the program computes in: fp32, fp16 or bf16.
        max_seq_len: the longest sequence to serve; by default what the model was made for, 2048 at most.
        until: the stage to bring it to.
        dump_ir: a folder for the program before and after each pass, as Python.
        trust_remote_code: run Python that the model brings along.
    """
    if dtype not in DTYPES:
        raise LlmcError(
            "DTYPE_UNKNOWN", f"The dtype {dtype!r} is not one of {', '.join(DTYPES)}.", "Choose one of them."
        )
    source = find_source(model, trust_remote_code=trust_remote_code)
    module = source.build(DTYPES[dtype])
    # What the module computes in, tensor by tensor: some parts stay in float32 whatever the rest is in.
    dtypes = {name: value.dtype for name, value in module.state_dict(keep_vars=True).items()}
    weights = {name: cast(weight, dtypes[name]) for name, weight in source.weights(module).items() if name in dtypes}
    if max_seq_len is None:
        max_seq_len = getattr(source.config, "max_position_embeddings", None) or DEFAULT_MAX_SEQ_LEN
        max_seq_len = min(max_seq_len, DEFAULT_MAX_SEQ_LEN)
    if max_seq_len < 1:
        raise LlmcError("MAX_SEQ_LEN_INVALID", f"max_seq_len is {max_seq_len}.", "Give 1 or more.")
    program = trace(module, weights, source.name, max_seq_len)
    return run_pipeline(program, until, dump=Path(dump_ir) if dump_ir else None)
