"""What leaves the layers of a reference: of a model by its own code, or of another artifact as it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...runtimes.measure.layers import LayerReference
from ...runtimes.measure.windows import Window

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
    """What the modules of these names give for windows of a text, in float32 by transformers.

    Args:
        model: a folder, a GGUF file, a hub id or "demo", or one that was found already.
        watch: told "reference, layers", and how many windows are done.
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
        given = eager_layers(module, weights, tokens, [name for name in names if name in known])
        found.append({name: [value.numpy() for value in values] for name, values in given.items()})
    return LayerReference(found)


def artifact_layers(
    folder: Path,
    windows: Sequence[Window],
    *,
    watch: Watch = lambda phase, done, total: None,
) -> LayerReference:
    """What leaves the layers of an artifact.

    Raises:
        LlmcError: NO_LAYER_BORDERS; and what opening an artifact raises.
    """
    from ...runtimes.artifact.open import open_artifact
    from ...runtimes.engines.ort.layers import WatchedEngine
    from ..targets.ort.layer_outputs import watch_layers

    manifest = open_artifact(folder)
    engine = WatchedEngine(folder, manifest, watch_layers(folder, manifest))
    found: list[dict[str, list[np.ndarray]]] = []
    for done, window in enumerate(windows):
        watch("reference, layers", done, len(windows))
        found.append({name: [value] for name, value in engine.values(window).items()})
    return LayerReference(found, engine.unclear)
