"""The rooms of the package: the purpose of each, and the other rooms that it may import.

docs/architecture.md contains this table. As a program, this module updates it there.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
NOT_PACKAGED = {"tests", "docs", "examples", "build", "dist"}
BEGIN, END = "<!-- rooms: begin -->\n", "<!-- rooms: end -->\n"


@dataclass(frozen=True)
class Room:
    """A package or a single module.

    Attributes:
        purpose: one line for the page.
        imports: the rooms that it may import beside itself.
    """

    purpose: str
    imports: tuple[str, ...] = ()


# A module belongs to the room with the longest name that it starts with.
ROOMS: dict[str, Room] = {
    "": Room(
        "the public names",
        (
            "errors", "version", "extras", "ir", "runtimes.engines", "runtimes.generate", "compiler.config",
            "compiler.api",
        ),
    ),
    "errors": Room("the exception classes"),
    "version": Room("the version"),
    "error_codes": Room("every error code: its class, when it occurs, what to do", ("errors",)),
    "extras": Room("optional modules, and the extra that installs each", ("errors",)),
    "kernels": Room("names of number formats, without torch"),
    "kernels.ops": Room("what each op of the dialect computes, defined once; mask rules", ("kernels",)),
    "ir": Room(
        "programs, their inputs by role, stages and their specs, weight expressions, stored codes, the printer",
        ("errors", "kernels.ops"),
    ),
    "passes.base": Room("the lifecycle of a pass; fuel", ("errors", "ir")),
    "passes.runner": Room("running lists of passes: order, fuel, dumps, log", ("errors", "ir", "passes.base")),
    "passes.queries": Room("questions that passes ask about nodes", ("kernels.ops", "ir")),
    "passes.match": Room("captured -> canonical", ("kernels.ops", "ir", "passes.base", "passes.queries")),
    "passes.optimize": Room(
        "canonical -> optimized",
        ("errors", "kernels.ops", "ir", "passes.base", "passes.queries", "passes.match"),
    ),
    "passes.quantize": Room(
        "schemes, the plan for each weight, quantized and pruned weights",
        ("errors", "kernels", "kernels.ops", "ir", "passes.base", "passes.queries"),
    ),
    "passes.cache": Room(
        "optimized -> cached: KV caches, selection of logits, fused attention",
        ("errors", "kernels.ops", "ir", "passes.base", "passes.queries"),
    ),
    "passes.pipeline": Room(
        "all target-neutral passes in one list",
        ("errors", "ir", "passes.base", "passes.runner", "passes.match", "passes.optimize", "passes.cache"),
    ),
    "runtimes.memory": Room("memory of this process"),
    "runtimes.cache_folder": Room("the user's folder for downloads and results"),
    "runtimes.artifact": Room("the artifact on disk: manifest, opening, writing, hashing, versions", ("errors",)),
    "runtimes.engines": Room(
        "the engine protocol, loading, the numeric check of the gate; below it one folder per engine",
        ("errors", "runtimes.cache_folder", "runtimes.artifact", "runtimes.cuda"),
    ),
    "runtimes.engines.ort": Room(
        "the engine of ONNX Runtime",
        ("errors", "runtimes.memory", "runtimes.artifact", "runtimes.cuda", "runtimes.engines"),
    ),
    "runtimes.engines.tensorrt": Room(
        "the engine of TensorRT",
        ("errors", "runtimes.cache_folder", "runtimes.artifact", "runtimes.cuda", "runtimes.engines"),
    ),
    "runtimes.cuda": Room("CUDA's driver without torch: memory, streams, graphs", ("errors",)),
    "runtimes.generate": Room("sampling, stopping, tokenizer, generation, `LLM`", ("errors", "runtimes.engines")),
    "runtimes.measure": Room(
        "bench, workloads and their traces, evaluation, layer errors, lm-eval, the check as a process",
        ("errors", "extras", "runtimes.memory", "runtimes.engines", "runtimes.generate"),
    ),
    "compiler.options": Room("options as dataclass fields, without torch", ("errors",)),
    "compiler.config": Room(
        "the options of a compilation, without torch",
        ("kernels", "passes.quantize", "compiler.options"),
    ),
    "compiler.phases": Room("time and memory by phase", ("runtimes.memory",)),
    "compiler.frontend": Room(
        "from a model to a captured program: sources, checkpoints, GGUF, capture",
        ("errors", "kernels.ops", "ir", "runtimes.cache_folder", "runtimes.artifact"),
    ),
    "compiler.targets": Room(
        "the target interface and the registry; below it one folder per target",
        (
            "errors", "ir", "passes.base", "passes.quantize", "runtimes.artifact", "runtimes.engines",
            "compiler.options", "compiler.config",
        ),
    ),
    "compiler.targets.onnx": Room(
        "the lowering to ONNX, which several targets can share",
        ("errors", "kernels.ops", "ir", "runtimes.engines"),
    ),
    "compiler.targets.ort": Room(
        "target ort",
        (
            "errors", "kernels", "ir", "passes.base", "passes.optimize", "passes.quantize", "passes.cache",
            "runtimes.artifact", "runtimes.engines", "runtimes.engines.ort", "compiler.options", "compiler.config",
            "compiler.targets", "compiler.targets.onnx",
        ),
    ),
    "compiler.targets.tensorrt": Room(
        "target trt",
        (
            "errors", "error_codes", "kernels.ops", "ir", "passes.base", "passes.pipeline", "passes.queries",
            "passes.optimize", "passes.quantize", "runtimes.cuda", "runtimes.memory", "runtimes.artifact",
            "runtimes.engines", "runtimes.engines.tensorrt", "compiler.options", "compiler.config",
            "compiler.targets", "compiler.targets.onnx",
        ),
    ),
    "compiler.recipe": Room("options from a file", ("errors", "passes.quantize", "compiler.targets")),
    "compiler.compress": Room(
        "calibration, GPTQ and other algorithms, bit allocation, pruning, `--max-kl`",
        (
            "errors", "kernels.ops", "ir", "passes.base", "passes.queries", "passes.optimize", "passes.quantize",
            "passes.pipeline", "runtimes.artifact", "runtimes.measure", "compiler.config", "compiler.phases",
            "compiler.frontend", "compiler.targets",
        ),
    ),
    "compiler.gate": Room(
        "references, the gate, the bisection of passes, layer outputs",
        (
            "errors", "error_codes", "kernels.ops", "ir", "passes.base", "passes.queries", "runtimes.cache_folder",
            "runtimes.artifact", "runtimes.engines", "runtimes.measure", "compiler.frontend", "compiler.targets",
        ),
    ),
    "compiler.metadata_files": Room("configs and tokenizer", ("errors", "ir", "compiler.frontend", "compiler.targets")),
    "compiler.describe": Room(
        "the manifest of what was compiled",
        (
            "version", "kernels.ops", "ir", "runtimes.artifact", "compiler.frontend", "compiler.targets",
            "compiler.compress",
        ),
    ),
    "compiler.build": Room(
        "writing an artifact and checking it",
        (
            "ir", "passes.base", "passes.runner", "passes.pipeline", "runtimes.artifact", "runtimes.engines",
            "runtimes.measure", "compiler.config", "compiler.phases", "compiler.frontend", "compiler.targets",
            "compiler.compress", "compiler.gate", "compiler.metadata_files", "compiler.describe",
        ),
    ),
    "compiler.finalize": Room(
        "building what an artifact needs on a certain machine",
        ("errors", "runtimes.artifact", "compiler.targets"),
    ),
    "compiler.trials": Room(
        "measuring trial artifacts",
        (
            "runtimes.generate", "runtimes.measure", "compiler.compress", "compiler.gate", "compiler.build",
        ),
    ),
    "compiler.api": Room(
        "`compile()` and `capture()` on one screen",
        (
            "errors", "ir", "passes.runner", "passes.pipeline", "runtimes.cache_folder", "runtimes.artifact",
            "runtimes.engines", "runtimes.measure", "compiler.options", "compiler.config", "compiler.phases",
            "compiler.frontend", "compiler.targets", "compiler.compress", "compiler.gate", "compiler.build",
            "compiler.trials",
        ),
    ),
    "compiler.inspect": Room(
        "looking at programs, models and machines: inspect, plan, doctor",
        (
            "errors", "version", "kernels.ops", "ir", "passes.base", "passes.runner", "passes.quantize",
            "passes.pipeline", "runtimes.artifact", "compiler.options", "compiler.config", "compiler.targets",
            "compiler.api",
        ),
    ),
    "compiler.cli": Room(
        "the `llmc` command, one file per verb",
        (
            "errors", "version", "error_codes", "extras", "ir", "passes.base", "passes.quantize", "runtimes.memory",
            "runtimes.artifact", "runtimes.engines", "runtimes.generate", "runtimes.measure", "compiler.options",
            "compiler.targets", "compiler.recipe", "compiler.gate", "compiler.api", "compiler.finalize",
            "compiler.inspect",
        ),
    ),
}  # fmt: skip


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Return the package's files by dotted name without `llmc.`; the root's own name is empty."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not any(part.startswith(".") for part in parts) and parts[0] not in NOT_PACKAGED:
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


def imports(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[tuple[str, bool]]:
    """Yield all imports in a module, and for each whether it is relative."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module), False
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] + ([node.module] if node.module else [])
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                yield whole if whole in known else ".".join(base), True


def room_of(name: str) -> str | None:
    """Return the room of a module, or None. Only the root's own module is in the room of the root."""
    if name == "":
        return ""
    fitting = [room for room in ROOMS if room and (name == room or name.startswith(f"{room}."))]
    return max(fitting, key=len, default=None)


def violations(known: Mapping[str, Path]) -> list[str]:
    """Return every relative import that the table does not allow."""
    found = []
    for name, path in known.items():
        home = room_of(name)
        for imported, relative in imports(name, path, known):
            target = room_of(imported)
            if not relative or is_folder_of_rooms(name):
                continue
            if home is None or target is None or (target != home and target not in ROOMS[home].imports):
                found.append(f"{name} imports {imported}")
    return found


def is_folder_of_rooms(name: str) -> bool:
    """Return True for folders, such as `passes`, that contain rooms but no code of their own."""
    return room_of(name) is None and any(room.startswith(f"{name}.") for room in ROOMS)


def cycles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Return a cycle of imports for each room that has one."""
    found = []
    for start in arrows:
        paths = [[start]]
        seen: set[str] = set()
        while paths:
            path = paths.pop()
            for after in sorted(arrows.get(path[-1], ())):
                if after == start:
                    found.append([*path, start])
                    paths.clear()
                    break
                if after not in seen:
                    seen.add(after)
                    paths.append([*path, after])
    return found


def arrows() -> dict[str, set[str]]:
    """Return the allowed imports between rooms."""
    return {name: set(room.imports) - {name} for name, room in ROOMS.items()}


def table() -> str:
    """Return the table for the page."""
    lines = ["| room | what is in it | may import |", "|---|---|---|"]
    for name, room in ROOMS.items():
        shown = f"`{name.replace('.', '/')}{'' if (ROOT / name.replace('.', '/')).is_dir() else '.py'}`"
        others = ", ".join(f"`{one.replace('.', '/')}`" for one in sorted(set(room.imports) - {name}))
        lines.append(f"| {shown if name else '`__init__.py`'} | {room.purpose} | {others or 'nothing'} |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """Return the page with a new table between its marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
    sys.stdout.write(f"Wrote {PAGE.relative_to(ROOT)}.\n")
