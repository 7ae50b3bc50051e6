"""The report about a machine, for simulated machines."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmc.compiler.inspect.doctor import Gpu, Package, examine, read_cpu
from llmc.compiler.targets.registry import target_names

# Two sockets with two cores each; two threads per core.
XEON = "\n\n".join(
    f"processor : {n}\nmodel name : Intel(R) Xeon(R)\nphysical id : {n // 4}\ncore id : {n // 2 % 2}\n"
    "flags : fpu avx2 avx512f avx512_vnni amx_tile amx_int8"
    for n in range(8)
)
ARM = "processor : 0\nBogoMIPS : 50.00\nFeatures : fp asimd asimddp i8mm bf16 sve\n\nprocessor : 1\nFeatures : fp asimd"


def test_physical_cores_are_counted_over_sockets_without_threads() -> None:
    cpu = read_cpu(XEON)
    assert cpu.model == "Intel(R) Xeon(R)"
    assert cpu.physical_cores == 4
    assert cpu.instructions == ("AVX2", "AVX512", "AVX512-VNNI", "AMX", "AMX-INT8")


def test_facts_missing_from_cpuinfo_stay_unknown() -> None:
    cpu = read_cpu(ARM)
    assert cpu.physical_cores is None
    assert cpu.instructions == ("NEON", "DOT", "I8MM", "BF16", "SVE")
    assert read_cpu("").instructions == ()


def with_packages(monkeypatch: pytest.MonkeyPatch, **installed: str) -> dict[str, Package]:
    """Simulate the installed packages, and return the report's packages by name."""
    table = {name.replace("_", "-"): version for name, version in installed.items()}

    def version(name: str) -> str:
        if name in table:
            return table[name]
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    return {p.name: p for p in examine().packages}


CAPTURE = {"torch": "2.12.0+cpu", "transformers": "5.20.1", "safetensors": "0.6.0", "gguf": "0.18.0"}


def with_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu) -> None:
    """Simulate the CUDA devices that torch reports."""
    properties = [
        SimpleNamespace(
            name=gpu.name,
            major=gpu.capability.split(".")[0],
            minor=gpu.capability.split(".")[1],
            total_memory=gpu.memory_bytes,
        )
        for gpu in gpus
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)


def test_the_remedy_for_a_missing_package_is_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = with_packages(monkeypatch, **CAPTURE)
    assert packages["onnxruntime"].version is None
    assert packages["onnxruntime"].remedy == "pip install 'llmc[cpu]'"
    assert packages["tokenizers"].remedy == "pip install 'llmc[cpu]'"
    assert packages["onnx"].remedy == "pip install 'llmc[compile]'"
    assert packages["torch"].remedy == ""


def test_one_of_two_equivalent_packages_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = with_packages(monkeypatch, onnxruntime_gpu="1.31.0", **CAPTURE)
    assert "onnxruntime" not in packages
    assert packages["onnxruntime-gpu"].remedy == ""
    assert {t.name: t for t in examine().targets}["ort"].run.can


def test_a_version_that_does_not_fit_fails_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = with_packages(monkeypatch, **(CAPTURE | {"torch": "2.9.1"}))
    assert packages["torch"].remedy.startswith("pip install 'torch")
    report = examine()
    assert not report.healthy
    assert "torch 2.9.1 does not fit" in report.targets[0].capture.reason


def test_without_a_gpu_the_cpu_target_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with_packages(monkeypatch, onnxruntime="1.31.0", onnx="1.23.2", **CAPTURE)
    with_gpus(monkeypatch)
    report = examine()
    assert report.healthy
    assert [(t.compile.can, t.run.can) for t in report.targets if t.name == "ort"] == [(True, True)]
    (trt,) = (target for target in report.targets if target.name == "trt")
    assert not trt.run.can and "GPU" in trt.run.reason
    gpu = Gpu("some", "9.0", 1)
    with_gpus(monkeypatch, gpu)
    assert examine().gpus == (gpu,)


@pytest.mark.parametrize(
    ("line", "wanted", "remedy"),
    [
        ('torch<2.14,>=2.11; extra == "compile"', "<2.14,>=2.11", "pip install 'llmc[compile]'"),
        ("torch (>=1.26) ; extra == 'cpu'", ">=1.26", "pip install 'llmc[cpu]'"),
        ("torch>=1.26", ">=1.26", "pip install 'torch'"),
        ("torchvision>=1; extra == 'dev'", "", "pip install 'torch'"),
    ],
)
def test_requirements_are_read_from_metadata(
    monkeypatch: pytest.MonkeyPatch, line: str, wanted: str, remedy: str
) -> None:
    monkeypatch.setattr(metadata, "requires", lambda _: [line])
    torch_package = with_packages(monkeypatch)["torch"]
    assert (torch_package.wanted, torch_package.remedy) == (wanted, remedy)


def test_a_version_that_cannot_be_read_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = with_packages(monkeypatch, **(CAPTURE | {"torch": "my own build"}))
    assert packages["torch"].remedy.startswith("pip install 'torch")


def test_compiling_for_ort_needs_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    with_packages(monkeypatch, onnxruntime="1.31.0", **CAPTURE)
    ort = {t.name: t for t in examine().targets}["ort"]
    assert ort.run.can
    assert "onnx is missing" in ort.compile.reason


def test_compiling_needs_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    with_packages(monkeypatch, onnxruntime="1.31.0", onnx="1.23.2")
    ort = {t.name: t for t in examine().targets}["ort"]
    assert ort.run.can
    assert "torch is missing" in ort.compile.reason


def test_the_reported_targets_are_those_of_compile() -> None:
    assert [t.name for t in examine().targets] == target_names()


def test_the_driver_is_read_from_the_kernel_module(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
    texts = {"/proc/driver/nvidia/version": line, "/proc/cpuinfo": "", "/proc/meminfo": ""}
    read_text = Path.read_text
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "exists", lambda path: str(path) in texts)

    def read(path: Path, *arguments: Any, **options: Any) -> str:
        return texts[str(path)] if str(path) in texts else read_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", read)
    report = examine()
    assert report.driver == "550.54.15"
    assert report.memory_bytes is None
