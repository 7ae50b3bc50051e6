"""Read what TensorRT logs of a build: the only source of an engine's kernels on a machine without a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>.*?), Inputs: (?P<inputs>.*?), Constants: (?P<constants>.*?), "
    r"Outputs: (?P<outputs>.*?), (?:TacticName: (?P<kernel>.*?), )?StreamId: .*?, Metadata: ?(?P<metadata>.*)$"
)
_TENSOR = re.compile(r"Name: (?P<name>.*?), Dimensions: \[(?P<dims>.*?)\].*?Datatype: (?P<dtype>\w+)")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")
# Engines list the kernels of all profiles one after the other. Each compiled part of the network has a number.
_PART = re.compile(r"_myl(\d+)(?:_\d+)?$")
_PROFILE = re.compile(r" \[profile (\d+)\]")
_UNNAMED = re.compile(r"_0x[0-9a-f]+|_myl\d+(?:_\d+)?$")
_ACTIVATION = re.compile(r"Total Activation Memory: (\d+) bytes")
_WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")

# Interface::method: Error Code 4: kind of error (reason In function at file:line)
_ERROR = re.compile(r"Error Code \d+: [\w /-]+ ?\((.*)\)$")
_NOISE = (
    re.compile(r" In \S+ at \S+:\d+$"),
    re.compile(r"\[[\w./]+:\d+: \w+\] "),
    re.compile(r"\w*Exception: (?:\w+\.\w+:\d+: )?(?:CHECK\(.*?\) failed\. )?"),
    re.compile(r"\(See https?://.*?\)"),
    re.compile(r" Alternatively, .*$"),
)
_NO_REASON = "the library gives no reason"
# After an error, on a machine without a GPU.
_CLEANING_UP = "catchCudaError"
# The inputs are 64-bit integers on purpose.
_EXPECTED_WARNING = "has Int64 binding."

_DTYPES = {"Float": "fp32", "Half": "fp16", "BFloat16": "bf16"}


@dataclass(frozen=True)
class EngineTensor:
    """A tensor of a kernel. Dynamic dimensions are -1."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numbers(self) -> int:
        """How many numbers it holds; 0 if a dimension is dynamic."""
        count = 1
        for size in self.shape:
            count *= max(size, 0)
        return count

    @property
    def numbers_per_entry(self) -> int:
        """How many numbers it holds for each step along its dynamic dimensions."""
        count = 1
        for size in self.shape:
            count *= size if size > 0 else 1
        return count


@dataclass(frozen=True)
class EngineLayer:
    """A kernel of an engine.

    Attributes:
        profile: the index of its profile.
        nodes: the names of the graph's nodes that it computes.
    """

    name: str
    kind: str
    kernel: str
    profile: int
    inputs: tuple[EngineTensor, ...]
    constants: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    nodes: tuple[str, ...]


class BuildLog:
    """Collects what a record needs from the messages of a build.

    Attributes:
        layers: the kernels of the engine, in the order of the profiles.
        activation_bytes: scratch memory of each profile.
        weight_bytes: memory of the engine's weights, or None before the engine is complete.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all messages."""
        self.layers: list[EngineLayer] = []
        self.activation_bytes: list[int] = []
        self.weight_bytes: int | None = None
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def add(self, severity: str, message: str) -> None:
        """Take in one message.

        Args:
            severity: the name of the library's severity, such as "VERBOSE".
        """
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(message)
        elif severity == "WARNING":
            warning = re.sub(r"^\w+\.cpp:\d+: ", "", message)
            if warning not in self.warnings and not warning.endswith(_EXPECTED_WARNING):
                self.warnings.append(warning)
        elif "LayerType: " in message:
            self.layers = list(_read_layers(message))
        elif found := _ACTIVATION.search(message):
            self.activation_bytes.append(int(found[1]))
        elif found := _WEIGHTS.search(message):
            self.weight_bytes = int(found[1])

    @property
    def first_error(self) -> str:
        """The first error, without codes and source positions."""
        telling = [message for message in self.errors if _CLEANING_UP not in message]
        return in_words((telling or self.errors or [""])[0])


def in_words(message: str) -> str:
    """Return the reason that an error of the library gives, without places in its source and a full stop."""
    text = " ".join(message.split())
    if found := _ERROR.search(text):
        text = found[1]
    for noise in _NOISE:
        text = noise.sub("", text)
    return " ".join(text.split())[:300].rstrip(" .") or _NO_REASON


def _read_layers(message: str) -> Iterator[EngineLayer]:
    found = [match for line in message.splitlines() if (match := _LAYER.search(line))]
    parts = [_PART.search(match["name"]) for match in found]
    profiles: dict[str | None, int] = {}
    for match, part in zip(found, parts, strict=True):
        key = part[1] if part else None
        profile = max((int(number) for number in _PROFILE.findall(match[0])), default=0)
        profiles[key] = max(profiles.get(key, 0), profile)
    for match, part in zip(found, parts, strict=True):
        # A layer outside all parts has the profile of its own names.
        own = max((int(number) for number in _PROFILE.findall(match[0])), default=0)
        yield EngineLayer(
            match["name"],
            match["kind"],
            _UNNAMED.sub("", match["kernel"] or _PROFILE.sub("", match["name"])),
            profiles[part[1]] if part else own,
            _read_tensors(match["inputs"]),
            _read_tensors(match["constants"]),
            _read_tensors(match["outputs"]),
            tuple(dict.fromkeys(_NODE.findall(match["metadata"]))),
        )


def _read_tensors(text: str) -> tuple[EngineTensor, ...]:
    return tuple(
        EngineTensor(
            _PROFILE.sub("", found["name"]),
            tuple(int(size) for size in found["dims"].split(",") if size),
            _DTYPES.get(found["dtype"], found["dtype"].lower()),
        )
        for found in _TENSOR.finditer(text)
    )
