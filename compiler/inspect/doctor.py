"""What this machine has and what of llmc can run on it."""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ...runtimes.artifact.versions import fits

# Packages of which one is enough stand together; of those that are absent the first is recommended.
_PACKAGES: tuple[tuple[str, ...], ...] = (
    ("torch",),
    ("transformers",),
    ("safetensors",),
    ("gguf",),
    ("numpy",),
    ("onnxruntime", "onnxruntime-gpu"),
    ("onnx",),
    ("tokenizers",),
)
_CAPTURE = ("torch", "transformers", "safetensors", "gguf")
# `config.TARGETS`, which can't be asked without torch.
_SERVED = ("ort",)
# A line of a package's metadata, such as `torch<2.14,>=2.11; extra == "compile"`.
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)\s*(\[[^]]*\])?\s*\(?(?P<wanted>[^;()]*)")
# What /proc/cpuinfo calls the instruction sets that decide how fast a kernel is.
_INSTRUCTIONS = {
    "avx2": "AVX2", "avx512f": "AVX512", "avx_vnni": "AVX-VNNI", "avx512_vnni": "AVX512-VNNI",
    "avx512_bf16": "AVX512-BF16", "avx512_fp16": "AVX512-FP16",
    "amx_tile": "AMX", "amx_int8": "AMX-INT8", "amx_bf16": "AMX-BF16",
    "asimd": "NEON", "asimddp": "DOT", "i8mm": "I8MM", "bf16": "BF16", "sve": "SVE", "sve2": "SVE2",
}  # fmt: skip


@dataclass(frozen=True)
class Package:
    """A package that llmc uses; `remedy` says how to get it or the right version, empty if nothing is wrong."""

    name: str
    version: str | None
    wanted: str
    remedy: str


@dataclass(frozen=True)
class Cpu:
    """The processor as /proc/cpuinfo describes it; what it doesn't say is None or empty."""

    model: str
    physical_cores: int | None
    logical_cores: int
    instructions: tuple[str, ...]


@dataclass(frozen=True)
class Gpu:
    """A CUDA device as torch sees it."""

    name: str
    capability: str
    memory_bytes: int


@dataclass(frozen=True)
class Answer:
    """Whether something can be done here, and if not, what is missing."""

    can: bool
    reason: str = ""

    def __str__(self) -> str:
        return "yes" if self.can else f"no: {self.reason}"


@dataclass(frozen=True)
class TargetSupport:
    """What the machine offers to one target, and what this version of llmc does for it."""

    name: str
    capture: Answer
    compile: Answer
    run: Answer
    this_llmc: tuple[str, ...]


@dataclass(frozen=True)
class MachineReport:
    """The whole examination."""

    llmc: str
    python: str
    system: str
    packages: tuple[Package, ...]
    cpu: Cpu
    memory_bytes: int | None
    available_bytes: int | None
    gpus: tuple[Gpu, ...]
    driver: str | None
    targets: tuple[TargetSupport, ...]

    @property
    def healthy(self) -> bool:
        """Whether what capture needs is there in versions that fit."""
        return all(target.capture.can for target in self.targets)


def examine() -> MachineReport:
    """Look at this machine; nothing is changed, nothing is fetched."""
    packages = tuple(map(_package, _PACKAGES))
    gpus = _gpus()
    memory = _meminfo()
    return MachineReport(
        llmc=_version("llmc") or "not installed",
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        packages=packages,
        cpu=read_cpu(_text("/proc/cpuinfo")),
        memory_bytes=memory.get("MemTotal"),
        available_bytes=memory.get("MemAvailable"),
        gpus=gpus,
        driver=_driver(),
        targets=_targets({p.name: p for p in packages}, bool(gpus)),
    )


def _package(names: tuple[str, ...]) -> Package:
    installed = next((name for name in names if _version(name)), None)
    name = installed or names[0]
    wanted, extras = _requirement(name)
    version = _version(name)
    if version is None:
        brings = f"llmc[{extras[0]}]" if extras else name
        return Package(name, None, wanted, f"pip install '{brings}'")
    if wanted and not _fits(version, wanted):
        return Package(name, version, wanted, f"pip install '{name}{wanted}'")
    return Package(name, version, wanted, "")


def _requirement(name: str) -> tuple[str, tuple[str, ...]]:
    """The versions that llmc asks for, and the extras that bring the package, by llmc's own metadata."""
    wanted, extras = "", []
    try:
        lines = metadata.requires("llmc") or []
    except metadata.PackageNotFoundError:
        lines = []
    for line in lines:
        found = _REQUIREMENT.match(line)
        if found and found["name"] == name:
            wanted = found["wanted"].strip()
            if extra := re.search(r"extra == ['\"](\w+)", line):
                extras.append(extra.group(1))
    return wanted, tuple(extras)


def _fits(version: str, wanted: str) -> bool:
    """Whether a version is in the range; one that can't be read is not."""
    try:
        return fits(version, wanted)
    except ValueError:
        return False


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _targets(packages: dict[str, Package], cuda: bool) -> tuple[TargetSupport, ...]:
    def needs(*names: str) -> Answer:
        for package in map(packages.__getitem__, names):
            if package.remedy:
                wrong = f"{package.version} does not fit" if package.version else "is missing"
                return Answer(False, f"{package.name} {wrong}: {package.remedy}")
        return Answer(True)

    ort = "onnxruntime-gpu" if "onnxruntime-gpu" in packages else "onnxruntime"
    no_gpu = Answer(False, "torch sees no CUDA device")
    return tuple(
        TargetSupport(
            name,
            capture=needs(*_CAPTURE),
            compile=needs(*_CAPTURE, runtime, *writers),
            run=needs(runtime) if cuda or not on_gpu else no_gpu,
            this_llmc=("capture", "compile", "run") if name in _SERVED else ("capture",),
        )
        for name, runtime, writers, on_gpu in (("ort", ort, ("onnx",), False),)
    )


def _gpus() -> tuple[Gpu, ...]:
    try:
        import torch
    except ImportError:
        return ()
    if not torch.cuda.is_available():
        return ()
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(Gpu(gpu.name, f"{gpu.major}.{gpu.minor}", gpu.total_memory) for gpu in found)


def _driver() -> str | None:
    """The version of NVIDIA's kernel module."""
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", _text("/proc/driver/nvidia/version"))
    return found.group(1) if found else None


def read_cpu(cpuinfo: str) -> Cpu:
    """The processor that the text of /proc/cpuinfo describes."""
    fields = [
        {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        for block in cpuinfo.strip().split("\n\n")
    ]
    cores = {(f["physical id"], f["core id"]) for f in fields if "physical id" in f and "core id" in f}
    flags = {flag for f in fields for key in ("flags", "Features") for flag in f.get(key, "").split()}
    names = [f["model name"] for f in fields if "model name" in f]
    return Cpu(
        model=names[0] if names else platform.processor() or platform.machine(),
        physical_cores=len(cores) or None,
        logical_cores=os.cpu_count() or 1,
        instructions=tuple(shown for flag, shown in _INSTRUCTIONS.items() if flag in flags),
    )


def _meminfo() -> dict[str, int]:
    lines = (line.split() for line in _text("/proc/meminfo").splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3}


def _text(path: str) -> str:
    """A file of a Linux system, or nothing elsewhere."""
    file = Path(path)
    return file.read_text() if sys.platform == "linux" and file.exists() else ""
