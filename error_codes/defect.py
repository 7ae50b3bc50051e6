"""Codes of `CheckFailedError` and of `CompilerError`: failed checks and defects of llmc itself."""

from __future__ import annotations

# Code -> when it occurs, what to do.
CHECK_FAILED: dict[str, tuple[str, str]] = {
    "DEVICE_CHECK_FAILED": (
        "An artifact that was compiled on another machine differs on this device from its model. It is not served.",
        "Update the driver and the library, or compile again. `llmc verify DIR` shows all checks.",
    ),
    "GATE_FAILED": (
        "The compiled artifact differs from the model by more than its precision explains. Nothing is written.",
        "Report the model with the whole message. It names the pass that causes the difference.",
    ),
}

DEFECT: dict[str, tuple[str, str]] = {
    "GATE_BROKEN": (
        "The process that checks a new artifact ended without a result.",
        "Check that the machine has enough memory, then report the model.",
    ),
    "INTERNAL_ERROR": (
        "Any error that llmc does not expect.",
        "Run the command again with `LLMC_TRACEBACK=1` and report the traceback.",
    ),
    "IR_INVALID": (
        "A program breaks a rule of its stage, for example after a pass.",
        "Report the model with the whole message.",
    ),
    "ONNX_INVALID": (
        "A graph that llmc wrote breaks the ONNX standard.",
        "Report the model with the whole message.",
    ),
    "PASS_ORDER": (
        "A pass runs before another one that it needs.",
        "If you did not change the list of passes, report it.",
    ),
}
