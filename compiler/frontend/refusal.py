"""Turn an error of torch's tracer into a refusal.

The refusal names the part of the model that caused the error.
"""

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

# Text in the tracer's errors when it needs a tensor's values (`_ON_VALUES`) or a fixed size (`_ON_SIZES`).
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
    """Silence torch's logs and stderr.

    A failed trace then reports only its exception.
    """
    with contextlib.ExitStack() as stack:
        for logger in map(logging.getLogger, _NOISY):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL + 1)
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


def refusal(model: nn.Module, error: Exception) -> LlmcError:
    """Build the error to raise for a model that can't be captured.

    Args:
        model: the model.
        error: the tracer's error. An `LlmcError` is returned as it is.
    """
    if isinstance(error, LlmcError):
        return error
    text = f"{type(error).__name__}: {error}"
    name, part, line = type(model).__name__, _module(model, error), _line(error)
    if is_about_sizes(error):
        return LlmcError(
            "CAPTURE_SPECIALIZED",
            f"{name} computes with a fixed batch or sequence size{line}: it loops over the sequence or turns a size "
            "into a Python number, so the captured graph is valid for one size only.",
            "Write that part as operations on whole tensors; a recurrence must become one op.",
        )
    if any(mark in text for mark in _ON_VALUES):
        return LlmcError(
            "CAPTURE_DATA_DEPENDENT",
            f"{name} has control flow or shapes that depend on tensor values{part}; a program has neither.",
            "Replace the branch or nonzero by masks, torch.where or a top-k of fixed size.",
        )
    first_line = text.strip().splitlines()[0][:200]
    return LlmcError(
        "CAPTURE_FAILED",
        f"{name} can't be traced{part} ({first_line}).",
        "Check that torch.export can export it with dynamic batch and sequence sizes.",
    )


def is_about_sizes(error: Exception) -> bool:
    """True if the trace fixed a batch or sequence size.

    No other way of tracing avoids that.
    """
    return any(mark in f"{type(error).__name__}: {error}" for mark in _ON_SIZES)


def _module(model: nn.Module, error: Exception) -> str:
    """Text for the innermost module on the error's stack, such as ` in DbrxExperts`.

    It is empty if that is the whole model.
    """
    modules = set(model.modules())
    owners = [f.f_locals.get("self") for f in _frames(error)]
    inside = [m for m in owners if isinstance(m, nn.Module) and m in modules]
    return f" in {type(inside[-1]).__name__}" if inside and inside[-1] is not model else ""


def _line(error: Exception) -> str:
    """Text for the source line that fixed a size, or "".

    For example: ` in mamba_selective_scan (modeling_mamba.py:260)`.

    The tracer's shape environment records the line.
    """
    modes = (v for f in _frames(error) for v in f.f_locals.values() if isinstance(v, FakeTensorMode))
    for shapes in (mode.shape_env for mode in modes if mode.shape_env is not None):
        for size, value in shapes.replacements.items():
            source = shapes.replacements_slocs.get(size)
            if value.is_number and source is not None and isinstance(source.framework_loc, FrameSummary):
                frame, file = source.framework_loc, Path(source.framework_loc.filename)
                if file.parent != Path(__file__).parent:  # `LogitsOf` itself makes the inputs' sizes equal
                    return f" in {frame.name} ({file.name}:{frame.lineno})"
    return ""


def _frames(error: BaseException | None) -> Iterator[FrameType]:
    """Yield the frames of the error's traceback, then those of its causes.

    The frames of each traceback come outermost first.
    """
    while error is not None:
        traceback = error.__traceback__
        while traceback is not None:
            yield traceback.tb_frame
            traceback = traceback.tb_next
        error = error.__cause__ or error.__context__
