"""Check, before any work, if this machine can build an engine.

Imports no torch: `llmc finalize` runs on machines without it.
"""

from __future__ import annotations

from collections.abc import Collection

from ....errors import LlmcError
from ....runtimes.cuda.libcuda import open_driver
from ....runtimes.engines.tensorrt.library import find_library
from .config import check_sms
from .options import TensorRtOptions
from .preflight import check_dtypes
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


def wanted_sms(options: TensorRtOptions) -> list[str]:
    """Return the compute capabilities to build for: as given, else that of this machine's GPU, else 8.9."""
    if options.sm is not None:
        return options.sms
    try:
        return [open_driver().device.sm]
    except LlmcError:
        return ["8.9"]
