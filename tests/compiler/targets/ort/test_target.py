"""What target ort takes and refuses, by device."""

from __future__ import annotations

from typing import Any

import pytest

from llmc.compiler.targets.ort.target import TARGET
from llmc.compiler.targets.registry import make_config
from llmc.errors import UsageError


def refused(**options: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        make_config(**options)
    return caught.value


def test_the_defaults_of_each_device() -> None:
    cpu, cuda = make_config(), make_config(device="cuda")
    assert (TARGET.dtype(cpu), TARGET.cache_kind(cpu)) == ("fp32", "ring")
    assert (TARGET.dtype(cuda), TARGET.cache_kind(cuda)) == ("fp16", "static")
    assert TARGET.dtype(make_config(device="cuda", dtype="bf16")) == "bf16"


def test_a_dtype_of_the_other_device() -> None:
    error = refused(dtype="fp16")
    assert error.code == "DTYPE_SLOW" and "with `device` cpu has no kernels that compute in fp16" in error.what
    error = refused(device="cuda", dtype="fp32")
    assert error.code == "DTYPE_SLOW" and "with `device` cuda has no kernels that compute in fp32" in error.what
    assert "fp16, bf16" in error.hint


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"quantize": "w8a8"}, "no matmul of 8-bit integers that takes their scales"),
        ({"quantize": "fp8"}, "in FP8 only with one scale for a whole matrix"),
        ({"kv_cache_dtype": "int8"}, "with `device` cuda has no `kv_cache_dtype` int8"),
        ({"kv_cache": "ring"}, "with `device` cuda has no ring `kv_cache`"),
        ({"ops": "standard"}, "ops is standard and device is cuda"),
        ({"quantize": "int4", "round_prompts": False}, "round_prompts is false"),
    ],
)
def test_what_only_a_cpu_does(options: dict[str, Any], why: str) -> None:
    make_config(**options)
    error = refused(device="cuda", **options)
    assert error.code == "CONFIG_INVALID" and why in error.what


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_schemes_that_both_devices_run(scheme: str) -> None:
    assert TARGET.scheme(make_config(device="cuda", quantize=scheme)) == TARGET.scheme(make_config(quantize=scheme))


def test_a_device_that_there_is_not() -> None:
    assert "device is 'gpu'" in refused(device="gpu").what


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_a_gpu_gets_one_graph(quantize: str | None) -> None:
    """Its kernels keep the inputs of linears exact, so no other graph is for prompts."""
    config = make_config(device="cuda", quantize=quantize)
    assert list(TARGET.finishing_passes(config, None, ())) == ["step"]
    assert TARGET.input_exemption(config) is None
    assert TARGET.input_exemption(make_config(quantize="int4")) is not None
