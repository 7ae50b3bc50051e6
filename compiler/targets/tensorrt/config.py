"""The builder's config: for which GPUs, and with which details in the log."""

from __future__ import annotations

from typing import Any

from ....errors import LlmcError
from ....runtimes.engines.tensorrt.library import TensorRt


def supported_sms(library: TensorRt) -> list[str] | None:
    """Return the compute capabilities that a library builds for, such as "8.9".

    None if it only builds for the GPU of this machine.
    """
    members = getattr(getattr(library.module, "ComputeCapability", None), "__members__", None)
    if members is None:
        return None
    numbers = sorted(int(name[2:]) for name in members if name.startswith("SM") and name[2:].isdigit())
    return [f"{number // 10}.{number % 10}" for number in numbers]


def make_config(library: TensorRt, builder: Any, sms: list[str]) -> Any:
    """Return a config for these compute capabilities.

    Raises:
        LlmcError: TRT_SM_UNSUPPORTED.
    """
    check_sms(library, sms)
    config = builder.create_builder_config()
    config.profiling_verbosity = library.module.ProfilingVerbosity.DETAILED
    if supported_sms(library) is not None:
        config.num_compute_capabilities = len(sms)
        for index, sm in enumerate(sms):
            config.set_compute_capability(getattr(library.module.ComputeCapability, f"SM{sm.replace('.', '')}"), index)
    return config


def check_sms(library: TensorRt, sms: list[str]) -> None:
    """Refuse compute capabilities that the library can't build for.

    Raises:
        LlmcError: TRT_SM_UNSUPPORTED.
    """
    known = supported_sms(library)
    if known is None:
        if len(sms) != 1:
            raise LlmcError(
                "TRT_SM_UNSUPPORTED",
                f"TensorRT for data centres builds for this machine's GPU only, not for {', '.join(sms) or 'none'}.",
                "Give the compute capability of this machine's GPU, or install tensorrt-rtx.",
            )
        return
    if missing := [sm for sm in sms if sm not in known] or ([] if sms else ["none"]):
        raise LlmcError(
            "TRT_SM_UNSUPPORTED",
            f"TensorRT-RTX {library.version} can't build for compute capability {', '.join(missing)}.",
            f"Choose among {', '.join(known)}. Other GPUs need TensorRT for data centres, on their own machine.",
        )
