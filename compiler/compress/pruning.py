"""What is taken out of a model before anything is rounded: layers that do little, and weights that matter little."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ...errors import LlmcError, UsageError
from ...ir.program import Program
from ...ir.stages import Stage
from ...passes.base import Pass
from ...passes.optimize.drop_layers import find_layers
from ...passes.pipeline import optimizing_passes, run_pipeline
from ...passes.quantize.prune import Prune
from ...runtimes.measure.texts import Text
from ..config import CompileConfig
from ..frontend.sources import ModelSource
from ..phases import Watch
from .cache import CalibrationCache
from .calibration_text import calibration_tokens
from .finite import check_finite
from .layer_importance import importance
from .prune_linears import Pruned, prune


@dataclass(frozen=True)
class Pruning:
    """What was decided to leave out.

    Attributes:
        importance: of each layer, in order, by name; empty where layers were not weighed.
        dropped: the names of the layers that go.
        pattern, algorithm: how weights were pruned; empty where they were not.
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
        """What brings a captured program to optimized, without the layers that go."""
        return optimizing_passes(self.dropped)

    @property
    def passes(self) -> list[Pass]:
        """What puts pruned weights into the optimized program."""
        return [Prune(self.pruned.weights, self.pruned.whole)] if self.pruned.weights else []

    def as_dict(self) -> dict[str, Any] | None:
        """What the manifest says of it; None where nothing is left out."""
        if not self:
            return None
        found: dict[str, Any] = {}
        if self.dropped:
            known = {name: round(value, 6) for name, value in self.importance.items()}
            found["layers"] = {"dropped": list(self.dropped), "importance": known}
        if self.pruned.weights:
            found["weights"] = {
                "pattern": self.pattern,
                "algorithm": self.algorithm,
                "sparsity": round(self.pruned.zeros / self.pruned.numbers, 6),
                "pruned": len(self.pruned.weights),
                "whole": dict(sorted(Counter(self.pruned.whole.values()).items())),
            }
        return found


def choose_layers(
    source: ModelSource,
    program: Program,
    config: CompileConfig,
    text: Text | None,
    cache: CalibrationCache,
    watch: Watch,
) -> Pruning:
    """Weigh the layers of a captured program, which is left as it was, and drop those that do least.

    Args:
        text: what to weigh them on.
        cache: stores the results until the artifact is written.

    Raises:
        LlmcError: LAYERS_NOT_A_CHAIN; LAYERS_TOO_FEW where none would be left.
    """
    program = run_pipeline(program.copy(), Stage.CANONICAL)
    layers = find_layers(program)
    if config.drop_layers >= len(layers):
        raise UsageError(
            "LAYERS_TOO_FEW",
            f"{config.drop_layers} of {len(layers)} layers can't be left out.",
            f"Drop {len(layers) - 1} or fewer: --drop-layers.",
        )
    tokens = _tokens(source, program, config, text)
    kept = cache.keep(
        "importance of layers",
        lambda: {
            "importance": importance(program, layers, tokens, lambda done, total: watch("weigh layers", done, total))
        },
    )
    known = dict(zip((layer.name for layer in layers), kept["importance"].evaluate().tolist(), strict=True))
    least = sorted(known, key=known.__getitem__)[: config.drop_layers]
    return Pruning(known, tuple(name for name in known if name in least))


def choose_weights(
    pruning: Pruning,
    source: ModelSource,
    program: Program,
    config: CompileConfig,
    text: Text | None,
    cache: CalibrationCache,
    watch: Watch,
) -> Pruning:
    """Prune the weights of an optimized program, which is left as it was; arguments as of `choose_layers`.

    Raises:
        LlmcError: PRUNE_NOTHING where no weight can be pruned.
    """
    assert config.sparsity is not None
    check_finite(program)
    tokens = _tokens(source, program, config, text)
    algorithm = config.prune_algorithm
    found = prune(program, config.sparsity, algorithm, tokens, cache, lambda done, total: watch("prune", done, total))
    if not found.weights:
        why = ", ".join(dict.fromkeys(found.whole.values())) or "it has no linears"
        raise LlmcError("PRUNE_NOTHING", f"No weight of this model can be pruned: {why}.", "Leave out --prune.")
    return replace(pruning, pattern=str(config.sparsity), algorithm=algorithm, pruned=found)


def _tokens(source: ModelSource, program: Program, config: CompileConfig, text: Text | None) -> Tensor:
    assert text is not None, "the config asks for one"
    return calibration_tokens(source, text, config.calibration, program.max_seq_len)
