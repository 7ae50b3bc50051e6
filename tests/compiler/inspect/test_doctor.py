"""The examination of a machine, on machines that are not at hand."""

from __future__ import annotations

from importlib import metadata

import pytest

from llmc.compiler.config import TARGETS
from llmc.compiler.inspect import doctor
from llmc.compiler.inspect.doctor import Package, examine, read_cpu

# Two sockets of two cores of two threads.
XEON = "\n\n".join(
    f"processor : {n}\nmodel name : Intel(R) Xeon(R)\nphysical id : {n // 4}\ncore id : {n // 2 % 2}\n"
    "flags : fpu avx2 avx512f avx512_vnni amx_tile amx_int8"
    for n in range(8)
)
ARM = "processor : 0\nBogoMIPS : 50.00\nFeatures : fp asimd asimddp i8mm bf16 sve\n\nprocessor : 1\nFeatures : fp asimd"


def test_cores_are_counted_over_sockets_and_threads_share_one() -> None:
    cpu = read_cpu(XEON)
    assert cpu.model == "Intel(R) Xeon(R)"
    assert cpu.physical_cores == 4
    assert cpu.instructions == ("AVX2", "AVX512", "AVX512-VNNI", "AMX", "AMX-INT8")


def test_what_cpuinfo_leaves_out_is_not_made_up() -> None:
    cpu = read_cpu(ARM)
    assert cpu.physical_cores is None
    assert cpu.instructions == ("NEON", "DOT", "I8MM", "BF16", "SVE")
    assert read_cpu("").instructions == ()


def versions(monkeypatch: pytest.MonkeyPatch, **installed: str) -> dict[str, Package]:
    table = {name.replace("_", "-"): version for name, version in installed.items()}

    def version(name: str) -> str:
        if name in table:
            return table[name]
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    return {p.name: p for p in examine().packages}


CAPTURE = {"torch": "2.12.0+cpu", "transformers": "5.20.1", "safetensors": "0.6.0", "gguf": "0.18.0"}


def test_an_absent_package_comes_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = versions(monkeypatch, **CAPTURE)
    assert found["onnxruntime"].version is None
    assert found["onnxruntime"].remedy == "pip install 'llmc[cpu]'"
    assert found["tokenizers"].remedy == "pip install 'llmc[cpu]'"
    assert found["onnx"].remedy == "pip install 'llmc[compile]'"
    assert found["torch"].remedy == ""


def test_one_of_two_packages_that_serve_alike_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    found = versions(monkeypatch, onnxruntime_gpu="1.31.0", **CAPTURE)
    assert "onnxruntime" not in found
    assert found["onnxruntime-gpu"].remedy == ""
    assert {t.name: t for t in examine().targets}["ort"].run.can


def test_a_version_that_does_not_fit_fails_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    found = versions(monkeypatch, **(CAPTURE | {"torch": "2.9.1"}))
    assert found["torch"].remedy.startswith("pip install 'torch")
    report = examine()
    assert not report.healthy
    assert "torch 2.9.1 does not fit" in report.targets[0].capture.reason


def test_without_a_gpu_the_cpu_target_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, onnxruntime="1.31.0", onnx="1.23.2", **CAPTURE)
    monkeypatch.setattr(doctor, "_gpus", lambda: ())
    report = examine()
    assert report.healthy
    assert [(t.name, t.compile.can, t.run.can) for t in report.targets] == [("ort", True, True)]


@pytest.mark.parametrize(
    ("line", "name", "wanted", "extra"),
    [
        ('torch<2.14,>=2.11; extra == "compile"', "torch", "<2.14,>=2.11", "compile"),
        ("lm-eval<0.5,>=0.4.13 ; extra == 'eval'", "lm-eval", "<0.5,>=0.4.13", "eval"),
        ("numpy>=1.26", "numpy", ">=1.26", None),
        ("numpy (>=1.26)", "numpy", ">=1.26", None),
        ('accelerate; extra == "dev"', "accelerate", "", "dev"),
        ('torchvision>=1; extra == "dev"', "torch", "", None),
    ],
)
def test_requirements_are_read_from_metadata(
    monkeypatch: pytest.MonkeyPatch, line: str, name: str, wanted: str, extra: str | None
) -> None:
    monkeypatch.setattr(metadata, "requires", lambda _: [line])
    assert doctor._requirement(name) == (wanted, (extra,) if extra else ())


def test_a_version_that_cannot_be_read_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = versions(monkeypatch, **(CAPTURE | {"torch": "my own build"}))
    assert found["torch"].remedy.startswith("pip install 'torch")


def test_what_an_artifact_is_written_with_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, onnxruntime="1.31.0", **CAPTURE)
    ort = {t.name: t for t in examine().targets}["ort"]
    assert ort.run.can
    assert "onnx is missing" in ort.compile.reason


def test_a_machine_that_only_runs_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, onnxruntime="1.31.0", onnx="1.23.2")
    ort = {t.name: t for t in examine().targets}["ort"]
    assert ort.run.can
    assert "torch is missing" in ort.compile.reason


def test_targets_are_claimed_that_can_be_compiled_for() -> None:
    assert {t.name for t in examine().targets if "compile" in t.this_llmc} == set(TARGETS)


def test_the_driver_is_read_from_the_kernel_module(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
    monkeypatch.setattr(doctor, "_text", lambda path: line if "nvidia" in path else "")
    report = examine()
    assert report.driver == "550.54.15"
    assert report.memory_bytes is None
