"""All target-neutral passes in order, from a captured program to a cached one. Read it top to bottom.

What follows for one runtime's kernels is in `Target.finishing_passes`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UsageError
from ..ir.caches import ChannelScales
from ..ir.program import Program
from ..ir.stages import Stage
from .base import Pass, Reach
from .cache.check_token_independence import CheckTokenIndependence
from .cache.hoist_logit_selection import HoistLogitSelection
from .cache.insert_kv_cache import InsertKvCache
from .cache.select_logits import SelectLogits
from .match.fold_constants import FoldConstants
from .match.match_activation import MatchActivation
from .match.match_attention import MatchAttention
from .match.match_concat import MatchConcat
from .match.match_embedding import MatchEmbedding
from .match.match_gated_act import MatchGatedAct
from .match.match_layer_norm import MatchLayerNorm
from .match.match_linear import MatchLinear
from .match.match_rms_norm import MatchRmsNorm
from .match.match_rope import MatchRope
from .match.precompute_positions import PrecomputePositions
from .match.read_positions import ReadPositions
from .match.remove_dead_code import RemoveDeadCode
from .match.remove_no_ops import RemoveNoOps
from .match.share_weights import ShareWeights
from .match.unify_op_names import UnifyOpNames
from .optimize.drop_layers import DropLayers
from .optimize.fold_scales import FoldScales
from .optimize.fuse_residual_norm import FuseResidualNorm
from .optimize.merge_gate_up import MergeGateUp
from .optimize.merge_qkv import MergeQkv
from .runner import Runner, check_order

PIPELINE: list[Pass] = [
    # captured -> canonical: every spelling of an operation becomes the one op that means it.
    UnifyOpNames(),  # first, so that no other pass has to know the aliases of an op
    RemoveNoOps(),  # so that no matcher has to look through ops that do nothing
    FoldConstants(),  # expressions over weights alone become weights: 1 + w, transposed matrices
    MatchConcat(),
    MatchAttention(),  # before the matchers below, which would trip over masks, alibi and repeated heads
    MatchLayerNorm(),
    MatchRmsNorm(),
    ReadPositions(),  # after MatchAttention: [S, S] masks must not become position tables. May produce rope's tables
    PrecomputePositions(),  # after MatchAttention: masks depend on positions too, and are no tables
    MatchRope(),
    MatchActivation(),
    MatchGatedAct(),
    MatchLinear(),
    MatchEmbedding(),
    ShareWeights(),
    RemoveDeadCode(),
    Reach(Stage.CANONICAL),
    # canonical -> optimized: the same numbers for less work.
    FoldScales(),
    MergeQkv(),  # after FoldScales: a scale on q alone must be in q's weight before the weights are joined
    MergeGateUp(),
    FuseResidualNorm(),
    Reach(Stage.OPTIMIZED),
]

check_order(PIPELINE)


def optimizing_passes(dropped: Sequence[str] = ()) -> list[Pass]:
    """Return captured -> optimized for an artifact.

    Args:
        dropped: layers to leave out. They go while the program is canonical: one value crosses each layer boundary.
    """
    canonical = next(i for i, p in enumerate(PIPELINE) if p.reaches is Stage.CANONICAL) + 1
    drop: list[Pass] = [DropLayers(dropped)] if dropped else []
    # CheckTokenIndependence refuses models whose state no cache keeps, before anything is spent on them.
    return [*PIPELINE[:canonical], *drop, *PIPELINE[canonical:], CheckTokenIndependence()]


def caching_passes(
    *, ring: bool = True, cache_codes: str | None = None, slack: int = 0, cache_scales: Sequence[ChannelScales] = ()
) -> list[Pass]:
    """Return optimized or quantized -> cached.

    Args:
        ring: layers with a sliding window keep only that window.
        cache_codes: format that keys and values are quantized to, "int8" or "fp8"; None keeps them.
        slack: how many positions such layers keep beyond their window.
        cache_scales: constant scales of int8 keys and values for each attention; empty: each token has its own.
    """
    return [InsertKvCache(ring, cache_codes, slack, cache_scales), SelectLogits(), HoistLogitSelection()]


def bring_to(program: Program, stage: Stage, runner: Runner | None = None) -> Program:
    """Run PIPELINE on a program until it has reached a stage, in place.

    If LLMC_FUEL runs out, the program stops at the last stage whose spec it satisfies.
    """
    reached = [p.stage for p in PIPELINE if isinstance(p, Reach)]
    for wanted in (stage, program.stage):
        if wanted not in (Stage.CAPTURED, *reached):
            raise UsageError(
                "STAGE_UNREACHED",
                f"The pipeline does not lead to or from {wanted}.",
                f"Choose one of {', '.join(map(str, reached))}.",
            )
    start = next((i + 1 for i, p in enumerate(PIPELINE) if p.reaches is program.stage), 0)
    return (runner or Runner()).run(program, PIPELINE[start:], until=stage)
