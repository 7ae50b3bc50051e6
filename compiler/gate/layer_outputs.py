"""Layer outputs of a reference: of a model by its own code, or of another artifact as it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...runtimes.artifact.open import open_artifact
from ...runtimes.engines.base import LayerEngine
from ...runtimes.measure.layers import LayerReference
from ...runtimes.measure.windows import Window
from ..targets.registry import find_target

if TYPE_CHECKING:
    from ..frontend.sources import ModelSource

Watch = Callable[[str, int, int], None]


def model_layers(
    model: str | ModelSource,
    names: Collection[str],
    windows: Sequence[Window],
    *,
    watch: Watch = lambda phase, done, total: None,
) -> LayerReference:
    """Run a model in float32 by transformers and keep the outputs of some of its modules.

    Args:
        model: a folder, a GGUF file, a hub id or "demo", or a source that was found already.
        names: the modules, such as `model.layers.0`; names that the model lacks are ignored.
        watch: called with "reference, layers", and how many windows are done.
    """
    import torch

    from ..frontend.eager import eager_layers
    from ..frontend.sources import find_source
    from .reference_logits import keep_in_memory

    source = find_source(model) if isinstance(model, str) else model
    module = source.build(torch.float32)
    weights = keep_in_memory(source.weights(module))
    known = {name for name, _ in module.named_modules()}
    found: list[dict[str, list[np.ndarray]]] = []
    for done, window in enumerate(windows):
        watch("reference, layers", done, len(windows))
        tokens = torch.from_numpy(window.tokens[None, :-1])
        outputs = eager_layers(module, weights, tokens, [name for name in names if name in known])
        found.append({name: [value.numpy() for value in values] for name, values in outputs.items()})
    return LayerReference(found)


def open_layers(folder: Path, *, threads: int | None = None) -> LayerEngine:
    """Open an artifact so that it also returns the outputs of its layers.

    Raises:
        LlmcError: NO_LAYER_BORDERS or LAYERS_UNSUPPORTED; and what opening an artifact raises.
    """
    manifest = open_artifact(folder, check_files=False)
    return find_target(manifest.target).open_layers(folder, threads=threads)


def artifact_layers(
    folder: Path,
    windows: Sequence[Window],
    *,
    watch: Watch = lambda phase, done, total: None,
) -> LayerReference:
    """Run an artifact and keep the outputs of its layers; errors as for `open_layers`."""
    engine = open_layers(folder)
    found: list[dict[str, list[np.ndarray]]] = []
    for done, window in enumerate(windows):
        watch("reference, layers", done, len(windows))
        found.append({name: [value] for name, value in engine.values(window.tokens[:-1]).items()})
    return LayerReference(found, engine.unclear)
