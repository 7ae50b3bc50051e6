"""The plan that fits this machine is chosen, and a machine without one is told why in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from mock_cuda import MockDriver
from neutral import PLAN, section

from llmc.errors import LlmcError
from llmc.runtimes.engines.tensorrt.library import TensorRt
from llmc.runtimes.engines.tensorrt.plans import choose_plan
from llmc.runtimes.engines.tensorrt.section import Library, Plan

RTX = Plan("rtx.plan", "tensorrt_rtx", "1.7.1.116", ["8.9", "12.0"], "rtx.json")
HERE = Path("out")


def choose(plans: list[Plan], sm: str = "8.9", **installed: str) -> Plan:
    """Choose a plan on a machine where these versions are installed."""

    def find(name: Library) -> TensorRt:
        if name not in installed:
            raise LlmcError("TENSORRT_MISSING", f"{name} is not installed.", "Install it.")
        return TensorRt(name, installed[name], None)

    plan, library = choose_plan(section(plans), MockDriver(sm=sm).device, HERE, find)
    assert library.name == plan.library and library.version == plan.version
    return plan


def refused(plans: list[Plan], sm: str = "8.9", **installed: str) -> LlmcError:
    with pytest.raises(LlmcError) as caught:
        choose(plans, sm, **installed)
    error = caught.value
    assert "\n" not in str(error) and error.hint and error.exit_status == 3
    return error


def test_the_first_plan_that_fits() -> None:
    both = {"tensorrt": PLAN.version, "tensorrt_rtx": RTX.version}
    assert choose([PLAN, RTX], **both) == PLAN
    assert choose([RTX, PLAN], **both) == RTX
    assert choose([PLAN, RTX], tensorrt_rtx=RTX.version) == RTX
    assert choose([PLAN, RTX], "12.0", **both) == RTX
    older = replace(PLAN, file="older.plan", version="10.14.0")
    assert choose([older, PLAN], tensorrt=PLAN.version) == PLAN


def test_an_artifact_without_a_plan() -> None:
    error = refused([])
    assert error.code == "PLAN_UNFIT" and "no plan yet" in error.what and "llmc finalize out" in error.hint


def test_another_gpu() -> None:
    error = refused([replace(RTX, sms=["12.0", "8.9"]), PLAN], "9.0", tensorrt=PLAN.version)
    assert error.code == "PLAN_UNFIT"
    assert error.what == "The artifact has plans for GPUs of compute capability 8.9, 12.0; Mock GPU has 9.0."


def test_another_version() -> None:
    error = refused([RTX], tensorrt_rtx="1.8.0")
    assert error.code == "PLAN_UNFIT" and "llmc finalize out" in error.hint
    assert error.what == "The plan for this GPU needs tensorrt_rtx 1.7.1.116; 1.8.0 is installed."


def test_a_library_that_is_not_installed() -> None:
    assert refused([RTX, PLAN]).what == "tensorrt_rtx is not installed."
    # The other plan's library is there: a plan for it helps more than another library.
    assert refused([RTX, PLAN], tensorrt="10.16").code == "PLAN_UNFIT"
    # The library of a plan for another GPU is of no use.
    assert refused([RTX, replace(PLAN, sms=["9.0"])], tensorrt=PLAN.version).code == "TENSORRT_MISSING"
