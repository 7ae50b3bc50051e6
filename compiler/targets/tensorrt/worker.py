"""The process that builds a plan: `python -m llmc.compiler.targets.tensorrt.worker`.

It reads a request from standard input, and writes a line of JSON for each event to standard output. It ends when its
standard input does, so it never outlives the process that started it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....errors import LlmcError
from ....runtimes.artifact.decode import decode, encode
from ....runtimes.engines.tensorrt.library import find_library
from ....runtimes.engines.tensorrt.record import BuildRecord, Fallback
from ....runtimes.engines.tensorrt.section import Library, Profile
from ....runtimes.memory import peak_rss
from .build_log import BuildLog
from .config import make_config
from .fusion import allow_decomposing
from .logger import make_logger, make_monitor, make_writer
from .make_record import describe_profiles
from .network import Network, find_attentions, find_matmuls, parse
from .polish import polish
from .profiles import add_profiles, shapes_of

Watch = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        profiles: by name.
        plan: the path to write the plan to.
        data_bytes: bytes of the graph's weights.
    """

    library: Library
    graph: str
    profiles: dict[str, Profile]
    sms: list[str]
    plan: str
    data_bytes: int


def build_here(request: BuildRequest, watch: Watch) -> BuildRecord:
    """Build a plan in this process.

    Raises:
        LlmcError: TRT_PARSE_REFUSED, TRT_SM_UNSUPPORTED or TRT_BUILD_FAILED.
    """
    start = time.monotonic()
    library = find_library(request.library)
    log = BuildLog()
    logger = make_logger(library.module, log)
    watch("Reading graph", 0, 1)
    network = parse(library, logger, Path(request.graph))
    polish(network)
    watch("Reading graph", 1, 1)
    matmuls, attentions, shapes = find_matmuls(network), find_attentions(network), shapes_of(request.profiles)
    fallbacks = allow_decomposing(network, attentions, shapes, request.sms)
    built = build_network(network, request, watch)
    if not built and _needs_decomposing(log):
        # A kernel that fits an attention alone may not fit it in its surroundings.
        known = {fallback.what for fallback in fallbacks}
        fallbacks += [
            Fallback(one.node, shape.name, log.first_error)
            for one in attentions
            if one.node not in known
            for shape in shapes
        ]
        for one in attentions:
            one.layer.attention.decomposable = True
        log.clear()
        built = build_network(network, request, watch)
    if not built:
        raise LlmcError(
            "TRT_BUILD_FAILED",
            f"TensorRT {library.version} can't build an engine: {log.first_error}.",
            "Compile the model for another target, or with another scheme or dtype.",
        )
    return BuildRecord(
        library.name,
        library.version,
        request.sms,
        describe_profiles(log, [shape.name for shape in shapes], matmuls, [one.node for one in attentions]),
        fallbacks,
        request.data_bytes,
        log.weight_bytes or 0,
        Path(request.plan).stat().st_size,
        peak_rss(),
        round(time.monotonic() - start, 1),
        log.warnings,
    )


def build_network(network: Network, request: BuildRequest, watch: Watch) -> bool:
    """Build a plan from a parsed network and write it. Return False if the library refuses; its log says why.

    Raises:
        OSError: the plan can't be written.
    """
    config = make_config(network.library, network.builder, request.sms)
    add_profiles(network, config, shapes_of(request.profiles))
    monitor = make_monitor(network.library.module, watch)
    config.progress_monitor = monitor
    with open(request.plan, "wb") as file:
        writer = make_writer(network.library.module, file)
        built = network.builder.build_serialized_network_to_stream(network.definition, config, writer)
    if writer.error is not None:
        raise writer.error
    return bool(built)


def _needs_decomposing(log: BuildLog) -> bool:
    return any("decomposable" in message for message in log.errors)


def main() -> None:
    """Serve one request."""
    # The library prints to standard output too: its lines go to standard error.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    request = decode(BuildRequest, json.loads(sys.stdin.readline()), "request")
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        record = build_here(request, lambda phase, done, total: send(phase=phase, done=done, total=total))
    except LlmcError as error:
        send(error=[error.code, error.what, error.hint])
    except OSError as error:
        send(os_error=[error.errno, error.strerror, request.plan])
    else:
        send(record=encode(record))


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
