"""Examine this machine, and what llmc can do on it."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ...runtimes.artifact.versions import fits
from ..targets.base import Target
from ..targets.registry import find_target, target_names

# Alternatives form one tuple: one of them is enough. If none is installed, the first is recommended.
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
# A line of a package's metadata, such as `torch<2.14,>=2.11; extra == "compile"`.
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)\s*(\[[^]]*\])?\s*\(?(?P<wanted>[^;()]*)")
# Instruction sets that kernels use: name in /proc/cpuinfo -> name to show.
_INSTRUCTIONS = {
    "avx2": "AVX2", "avx512f": "AVX512", "avx_vnni": "AVX-VNNI", "avx512_vnni": "AVX512-VNNI",
    "avx512_bf16": "AVX512-BF16", "avx512_fp16": "AVX512-FP16",
    "amx_tile": "AMX", "amx_int8": "AMX-INT8", "amx_bf16": "AMX-BF16",
    "asimd": "NEON", "asimddp": "DOT", "i8mm": "I8MM", "bf16": "BF16", "sve": "SVE", "sve2": "SVE2",
}  # fmt: skip


@dataclass(frozen=True)
class Package:
    """A package that llmc uses.

    Attributes:
        version: the installed version; None if it is not installed.
        wanted: the versions that llmc requires; empty if it accepts all.
        remedy: the command that installs it or the right version; empty if nothing is wrong.
    """

    name: str
    version: str | None
    wanted: str
    remedy: str


@dataclass(frozen=True)
class Cpu:
    """The processor by /proc/cpuinfo; unknown fields are None or empty."""

    model: str
    physical_cores: int | None
    logical_cores: int
    instructions: tuple[str, ...]


@dataclass(frozen=True)
class Gpu:
    """A CUDA device that torch finds."""

    name: str
    capability: str
    memory_bytes: int


@dataclass(frozen=True)
class Answer:
    """The ability to do one step here, and the reason if it is missing."""

    can: bool
    reason: str = ""

    def __str__(self) -> str:
        return "yes" if self.can else f"no: {self.reason}"


@dataclass(frozen=True)
class TargetSupport:
    """The steps that this machine can do for one target."""

    name: str
    summary: str
    capture: Answer
    compile: Answer
    run: Answer


@dataclass(frozen=True)
class MachineReport:
    """The result of `examine`."""

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
        """True if all packages that capture needs are installed in the right versions."""
        return all(target.capture.can for target in self.targets)


def examine() -> MachineReport:
    """Examine this machine, without changing or downloading anything."""
    targets = [find_target(name) for name in target_names()]
    packages = tuple(map(_package, _packages_of(targets)))
    gpus = find_gpus()
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
        targets=_supports(targets, {p.name: p for p in packages}),
    )


def _package(names: tuple[str, ...]) -> Package:
    installed = next((name for name in names if _version(name)), None)
    name = installed or names[0]
    wanted, extras = _requirement(name)
    version = _version(name)
    if version is None:
        requirement = f"llmc[{extras[0]}]" if extras else name
        return Package(name, None, wanted, f"pip install '{requirement}'")
    if wanted and not _fits(version, wanted):
        return Package(name, version, wanted, f"pip install '{name}{wanted}'")
    return Package(name, version, wanted, "")


def _requirement(name: str) -> tuple[str, tuple[str, ...]]:
    """Return the versions of a package that llmc requires, and the extras that install it."""
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
    """Return True if a version is in the range; False if it can't be parsed."""
    try:
        return fits(version, wanted)
    except ValueError:
        return False


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _packages_of(targets: Sequence[Target]) -> list[tuple[str, ...]]:
    """Return the packages that llmc needs, and those that only a target needs."""
    known = {name for names in _PACKAGES for name in names}
    needed = (name for target in targets for names in target.facts.packages.values() for name in names)
    return [*_PACKAGES, *((name,) for name in dict.fromkeys(needed) if name not in known)]


def _supports(targets: Sequence[Target], packages: dict[str, Package]) -> tuple[TargetSupport, ...]:
    # Alternatives stand for each other: each name maps to the one that is listed.
    found = {name: packages[known] for names in _PACKAGES for known in names if known in packages for name in names}

    def needs(*names: str) -> Answer:
        for package in (found.get(name) or packages[name] for name in names):
            if package.remedy:
                wrong = f"{package.version} does not fit" if package.version else "is missing"
                return Answer(False, f"{package.name} {wrong}: {package.remedy}")
        return Answer(True)

    def support(target: Target) -> TargetSupport:
        compiling, running = target.facts.packages["compile"], target.facts.packages["run"]
        can_run = needs(*running)
        # The gate runs the artifact, so compiling needs the engine too.
        can_compile = needs(*_CAPTURE, *compiling, *running)
        if can_run.can and (lacks := target.missing("run")):
            can_run = Answer(False, lacks)
        if can_compile.can and (lacks := target.missing("compile")):
            can_compile = Answer(False, lacks)
        return TargetSupport(target.name, target.summary, needs(*_CAPTURE), can_compile, can_run)

    return tuple(map(support, targets))


def find_gpus() -> tuple[Gpu, ...]:
    """Return the CUDA devices that torch finds; none if torch is not installed."""
    try:
        import torch
    except ImportError:
        return ()
    if not torch.cuda.is_available():
        return ()
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(Gpu(gpu.name, f"{gpu.major}.{gpu.minor}", gpu.total_memory) for gpu in found)


def _driver() -> str | None:
    """Return the version of NVIDIA's kernel module, or None."""
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", _text("/proc/driver/nvidia/version"))
    return found.group(1) if found else None


def read_cpu(cpuinfo: str) -> Cpu:
    """Return the processor that the text of /proc/cpuinfo describes."""
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
    """Return the text of a file of a Linux system; empty if there is none."""
    file = Path(path)
    return file.read_text() if sys.platform == "linux" and file.exists() else ""
