"""Why a model can't be traced, in the model's terms."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from traceback import FrameSummary
from types import FrameType

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...errors import LlmcError

# What tracing says when a tensor's values would have to be known, and when a size would have to be.
_ON_VALUES = (
    "data-dependent",
    "DataDependent",
    "DynamicOutputShape",
    "_local_scalar_dense",
    "aten.nonzero",
    "aten._unique2",
    "Dynamic control flow",
)
_ON_SIZES = ("Constraints violated", "ConstraintViolation", "specialized")
_NOISY = ("torch._guards", "torch._dynamo", "torch.export", "torch.fx.experimental.symbolic_shapes")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within, a trace that fails says so by its exception alone."""
    with contextlib.ExitStack() as stack:
        for logger in map(logging.getLogger, _NOISY):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL + 1)
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


def refusal(model: nn.Module, error: Exception) -> LlmcError:
    """The error to raise for a model that no way of tracing could capture, from what the first one said."""
    if isinstance(error, LlmcError):
        return error
    said = f"{type(error).__name__}: {error}"
    name, part, line = type(model).__name__, _module(model, error), _line(error)
    if is_about_sizes(error):
        return LlmcError(
            "CAPTURE_SPECIALIZED",
            f"{name} computes with a fixed batch or sequence size{line}: it loops over the sequence or turns a size "
            "into a Python number, so that what was captured holds for one size only.",
            "Write that part as operations on whole tensors; a recurrence must become one op.",
        )
    if any(mark in said for mark in _ON_VALUES):
        return LlmcError(
            "CAPTURE_DATA_DEPENDENT",
            f"{name} decides by the values of a tensor what to compute{part}, but a program is the same for all.",
            "Write that part with masks, where or top-k of a fixed number instead of a branch or nonzero.",
        )
    first_line = said.strip().splitlines()[0][:200]
    return LlmcError(
        "CAPTURE_FAILED",
        f"{name} can't be traced{part} ({first_line}).",
        "Check that it runs under torch.export with its batch and sequence sizes dynamic.",
    )


def is_about_sizes(error: Exception) -> bool:
    """Whether a size got burnt in, which no way of tracing avoids."""
    return any(mark in f"{type(error).__name__}: {error}" for mark in _ON_SIZES)


def _module(model: nn.Module, error: Exception) -> str:
    """` in DbrxExperts`: the innermost part of the model that the error passed, if it is not the whole."""
    modules = set(model.modules())
    owners = [f.f_locals.get("self") for f in _frames(error)]
    inside = [m for m in owners if isinstance(m, nn.Module) and m in modules]
    return f" in {type(inside[-1]).__name__}" if inside and inside[-1] is not model else ""


def _line(error: Exception) -> str:
    """` in mamba_selective_scan (modeling_mamba.py:260)`: where a size became a number, as the tracer remembers it."""
    modes = (v for f in _frames(error) for v in f.f_locals.values() if isinstance(v, FakeTensorMode))
    for shapes in (mode.shape_env for mode in modes if mode.shape_env is not None):
        for size, value in shapes.replacements.items():
            source = shapes.replacements_slocs.get(size)
            if value.is_number and source is not None and isinstance(source.framework_loc, FrameSummary):
                frame, file = source.framework_loc, Path(source.framework_loc.filename)
                if file.parent != Path(__file__).parent:  # where capture says that both inputs have one size
                    return f" in {frame.name} ({file.name}:{frame.lineno})"
    return ""


def _frames(error: BaseException | None) -> Iterator[FrameType]:
    """Every frame that the error passed, and those of the errors behind it, outermost first."""
    while error is not None:
        traceback = error.__traceback__
        while traceback is not None:
            yield traceback.tb_frame
            traceback = traceback.tb_next
        error = error.__cause__ or error.__context__
