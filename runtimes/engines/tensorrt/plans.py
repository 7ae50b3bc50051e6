"""Choose the plan that this machine can run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ....errors import LlmcError
from ...cuda.driver import Device
from .library import TensorRt
from .section import Library, Plan, TensorRtSection


def choose_plan(
    section: TensorRtSection, device: Device, folder: Path, find: Callable[[Library], TensorRt]
) -> tuple[Plan, TensorRt]:
    """Return the first plan for this machine, and the library that runs it.

    Args:
        find: returns an installed library, as `find_library`.

    Raises:
        LlmcError: PLAN_UNFIT if no plan is for this GPU and an installed library; the error of `find` if no library of
            the plans for this GPU is installed.
    """
    if not section.plans:
        raise _unfit("The artifact has no plan yet", folder)
    fitting = [plan for plan in section.plans if device.sm in plan.sms]
    if not fitting:
        sms = ", ".join(sorted({sm for plan in section.plans for sm in plan.sms}, key=_in_order))
        what = f"The artifact has plans for GPUs of compute capability {sms}; {device.name} has {device.sm}"
        raise _unfit(what, folder)
    missing, other = None, None
    for plan in fitting:
        try:
            library = find(plan.library)
        except LlmcError as error:
            missing = missing or error
            continue
        if library.version == plan.version:
            return plan, library
        other = other or f"The plan for this GPU needs {plan.library} {plan.version}; {library.version} is installed"
    if other is None:
        assert missing is not None
        raise missing
    raise _unfit(other, folder)


def _in_order(sm: str) -> list[int]:
    return [int(part) if part.isdigit() else 0 for part in sm.split(".")]


def _unfit(what: str, folder: Path) -> LlmcError:
    return LlmcError("PLAN_UNFIT", f"{what}.", f"Build a plan on this machine: llmc finalize {folder}")
