"""The last error of the library becomes one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_tensorrt import FakeTensorRt, Logger
from mock_cuda import MockDriver

from llmc.errors import LlmcError
from llmc.runtimes.engines.tensorrt.library import find_library
from llmc.runtimes.engines.tensorrt.messages import error_log
from llmc.runtimes.engines.tensorrt.open_plan import OpenPlan


def test_the_last_error_is_kept() -> None:
    log = error_log(FakeTensorRt(MockDriver()).library().module)
    assert log.error is None
    for severity in ("WARNING", "INFO", "VERBOSE"):
        log.log(Logger.Severity[severity], "not an error")
    assert log.error is None
    log.log(Logger.Severity.ERROR, "[engine.cpp::load::7] Error Code 6: the plan is too old.\nmore")
    assert log.error == "Error Code 6: the plan is too old"
    log.log(Logger.Severity.INTERNAL_ERROR, "x" * 1000)
    assert log.error == "x" * 300
    log.log(Logger.Severity.ERROR, "")
    assert log.error == "an error without a message"


def test_the_real_library_says_why_it_refuses_a_plan(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "engine.plan").write_bytes(bytes(1000))
    driver = MockDriver()
    with pytest.raises(LlmcError) as caught:
        OpenPlan(tmp_path / "engine.plan", "", find_library("tensorrt_rtx"), driver, 0, [], [])
    what = caught.value.what
    assert caught.value.code == "PLAN_REFUSED" and "engine.plan: Error Code" in what and "\n" not in what
    assert driver.live == {}
