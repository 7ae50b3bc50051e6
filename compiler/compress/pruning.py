"""Drop layers that change little and prune weights that matter little, before anything is quantized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from ...errors import LlmcError, UsageError
from ...ir.program import Program
from ...ir.stages import Stage
from ...passes.base import Pass
from ...passes.optimize.drop_layers import find_layers
from ...passes.pipeline import bring_to, optimizing_passes
from ...passes.quantize.prune import Prune
from ...runtimes.artifact.manifest import DroppedLayers, PrunedWeights, PruningSpec
from ...runtimes.measure.texts import Text
from ..config import CompileConfig
from ..frontend.sources import ModelSource
from ..phases import Watch
from .cache import CalibrationCache
from .calibration_text import calibration_tokens
from .finite import check_finite
from .layer_importance import importance
from .prune_linears import Pruned, prune
from .sparsity import Sparsity


@dataclass(frozen=True)
class Pruning:
    """The layers that are dropped and the weights that are pruned.

    Attributes:
        importance: the importance of each layer, in order, by name; empty if it was not measured.
        dropped: the names of the layers that are dropped.
        pattern, algorithm: how weights are pruned; empty if they are not.
        pruned: the pruned weights.
    """

    importance: Mapping[str, float] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    pattern: str = ""
    algorithm: str = ""
    pruned: Pruned = field(default_factory=Pruned)

    def __bool__(self) -> bool:
        return bool(self.dropped or self.pruned.weights)

    @property
    def optimizing(self) -> list[Pass]:
        """The passes that bring a captured program to optimized, and drop the layers."""
        return optimizing_passes(self.dropped)

    @property
    def passes(self) -> list[Pass]:
        """The passes that put the pruned weights into the optimized program."""
        return [Prune(self.pruned.weights, self.pruned.unpruned)] if self.pruned.weights else []

    def spec(self) -> PruningSpec | None:
        """Return the entry of the manifest; None if nothing is dropped or pruned."""
        if not self:
            return None
        layers = weights = None
        if self.dropped:
            layers = DroppedLayers(
                dropped=list(self.dropped),
                importance={name: round(value, 6) for name, value in self.importance.items()},
            )
        if self.pruned.weights:
            weights = PrunedWeights(
                pattern=self.pattern,
                algorithm=self.algorithm,
                sparsity=round(self.pruned.zeros / self.pruned.numbers, 6),
                pruned=len(self.pruned.weights),
                whole=dict(sorted(Counter(self.pruned.unpruned.values()).items())),
            )
        return PruningSpec(layers, weights)


def choose_layers(
    source: ModelSource,
    program: Program,
    config: CompileConfig,
    text: Text | None,
    cache: CalibrationCache,
    watch: Watch,
) -> Pruning:
    """Measure the importance of the layers of a captured program, and choose the least important ones.

    Args:
        program: is not changed.
        text: the text that importance is measured on.
        cache: stores the results until the artifact is written.

    Raises:
        LlmcError: LAYERS_NOT_A_CHAIN; LAYERS_TOO_FEW if no layer would remain.
    """
    program = bring_to(program.copy(), Stage.CANONICAL)
    layers = find_layers(program)
    if config.drop_layers >= len(layers):
        raise UsageError(
            "LAYERS_TOO_FEW",
            f"The model has {len(layers)} layers, so {config.drop_layers} can't be dropped.",
            f"Set --drop-layers to {len(layers) - 1} or less.",
        )
    tokens = _tokens(source, program, config, text)
    stored = cache.keep(
        "importance of layers",
        lambda: {
            "importance": importance(
                program, layers, tokens, lambda done, total: watch("measure layer importance", done, total)
            )
        },
    )
    by_name = dict(zip((layer.name for layer in layers), stored["importance"].evaluate().tolist(), strict=True))
    least = sorted(by_name, key=by_name.__getitem__)[: config.drop_layers]
    return Pruning(by_name, tuple(name for name in by_name if name in least))


def choose_weights(
    pruning: Pruning,
    source: ModelSource,
    program: Program,
    config: CompileConfig,
    text: Text | None,
    cache: CalibrationCache,
    watch: Watch,
) -> Pruning:
    """Compute pruned weights for an optimized program, which is not changed.

    Args:
        pruning: the layers that `choose_layers` chose.

    Raises:
        LlmcError: PRUNE_NOTHING if no weight can be pruned.
    """
    assert config.prune is not None
    sparsity = Sparsity.parse(config.prune)
    check_finite(program)
    tokens = _tokens(source, program, config, text)
    algorithm = config.prune_algorithm
    pruned = prune(program, sparsity, algorithm, tokens, cache, lambda done, total: watch("prune", done, total))
    if not pruned.weights:
        why = ", ".join(dict.fromkeys(pruned.unpruned.values())) or "it has no linears"
        raise LlmcError("PRUNE_NOTHING", f"No weight of this model can be pruned: {why}.", "Compile without --prune.")
    return replace(pruning, pattern=str(sparsity), algorithm=algorithm, pruned=pruned)


def _tokens(source: ModelSource, program: Program, config: CompileConfig, text: Text | None) -> Tensor:
    assert text is not None, "pruning and dropping layers need a text"
    return calibration_tokens(source, text, config.calib_samples, config.calib_length, program.max_seq_len)
