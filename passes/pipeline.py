"""All passes in order, from what was captured to what a back end lowers. Read it top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import CompilerError, LlmcError, UsageError
from ..ir.printer import to_python
from ..ir.program import Program
from ..ir.stages import Stage, verify
from .base import Fuel, Pass, PassResult
from .cache.check_token_independence import CheckTokenIndependence
from .cache.fuse_attention import FuseAttention
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
from .optimize.unmerge_linears import UnmergeLinears
from .quantize.round_activations import RoundActivations, RoundInKernels


class Reach(Pass):
    """Declare a stage reached; the verifier then holds the program to the stage's spec."""

    def __init__(self, stage: Stage) -> None:
        self.stage = self.reaches = stage

    @property
    def name(self) -> str:
        return f"Reach({self.stage})"

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        return PassResult(0)


PIPELINE: list[Pass] = [
    # captured -> canonical: every spelling of a thing becomes the one op that means it.
    UnifyOpNames(),  # first, so that no other pass has to know what else an op is called
    RemoveNoOps(),  # and no matcher has to look through what does nothing
    FoldConstants(),  # what hangs on weights alone becomes a weight: 1 + w, transposed matrices
    MatchConcat(),
    MatchAttention(),  # takes masks, alibi and repeated heads with it, which others would stumble over
    MatchLayerNorm(),
    MatchRmsNorm(),
    ReadPositions(),  # behind attention, whose masks are counted from each to each; what it makes may be rope's tables
    PrecomputePositions(),  # behind attention: masks depend on positions as well and are no tables
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
    MergeQkv(),  # behind FoldScales: a scale on q alone must be in q's weight before the weights are joined
    MergeGateUp(),
    FuseResidualNorm(),
    Reach(Stage.OPTIMIZED),
]


def optimizing_passes(dropped: Sequence[str] = ()) -> list[Pass]:
    """captured -> optimized for an engine, without these layers: they go while one value crosses each border."""
    canonical = next(i for i, p in enumerate(PIPELINE) if p.reaches is Stage.CANONICAL) + 1
    drop: list[Pass] = [DropLayers(dropped)] if dropped else []
    # The last one before anything is spent on a model whose state no cache keeps.
    return [*PIPELINE[:canonical], *drop, *PIPELINE[canonical:], CheckTokenIndependence()]


def engine_passes(rounding: Sequence[Pass], *, ring: bool, fuse: bool, cache_codes: str | None = None) -> list[Pass]:
    """optimized -> cached: what an engine rounds, and what it keeps.

    Args:
        rounding: what puts rounded weights in place, of a plan for this very program.
        ring: layers with a sliding window keep that window only.
        fuse: for a back end whose attention takes rotation and heads with it.
        cache_codes: what keys and values are rounded to, "int8" or "fp8"; None: they are not.
    """
    return [
        *rounding,
        InsertKvCache(ring, cache_codes),
        SelectLogits(),
        HoistLogitSelection(),
        *([FuseAttention()] if fuse else []),
    ]


def few_rows_passes() -> list[Pass]:
    """cached -> cached: the same for a token or a few, whose matmuls wait for weights."""
    return [RoundInKernels()]


def many_rows_passes(*, rounding: bool = True, exact: Collection[str] = ()) -> list[Pass]:
    """cached -> cached: the same for many tokens at once, whose matmuls wait for arithmetic and not for weights.

    Args:
        rounding: whether inputs are rounded that the program leaves as they are.
        exact: weights whose inputs are not rounded all the same.
    """
    return [*([RoundActivations(exact)] if rounding else []), UnmergeLinears()]


def check_order(passes: Sequence[Pass], done: Program | None = None) -> None:
    """Refuse a list in which a pass stands before one that it must follow, or before the stage that it needs.

    Args:
        done: the program that the list goes on with; one that was just captured where it is None.
    """
    earlier_names = [record.name for record in done.history] if done else []
    names = [*earlier_names, *(p.name for p in passes)]
    reached = done.stage if done else Stage.CAPTURED
    for place, subject in enumerate(passes, len(earlier_names)):
        if subject.reaches is not None and subject.reaches <= reached:
            raise CompilerError("PASS_ORDER", f"{subject.name} leads back from {reached}.", "Reorder the pipeline.")
        for earlier in subject.after:
            if earlier.__name__ not in names[:place]:
                raise CompilerError(
                    "PASS_ORDER", f"{subject.name} stands before {earlier.__name__}.", "Reorder the pipeline."
                )
        if subject.needs > reached:
            raise CompilerError(
                "PASS_ORDER", f"{subject.name} needs a {subject.needs} program.", "Reorder the pipeline."
            )
        reached = subject.reaches or reached


check_order(PIPELINE)


def run_pipeline(
    program: Program,
    until: Stage,
    *,
    dump: Path | None = None,
    watch: Callable[[Pass, PassResult], None] = lambda subject, result: None,
) -> Program:
    """Bring a program up to a stage, in place.

    Args:
        until: if LLMC_FUEL runs out, the program stops at the last stage whose promise it keeps.
        dump: a folder for the program before the first and after each pass, as numbered Python files.
        watch: called after each pass.
    """
    reached = [p.stage for p in PIPELINE if isinstance(p, Reach)]
    for stage in (until, program.stage):
        if stage not in (Stage.CAPTURED, *reached):
            raise UsageError(
                "STAGE_UNREACHED",
                f"No pass of the pipeline reaches {stage}.",
                f"Choose one of {', '.join(map(str, reached))}.",
            )
    fuel = Fuel.from_environment()
    dumper = Dump.of(dump, program)
    start = next((i + 1 for i, p in enumerate(PIPELINE) if isinstance(p, Reach) and p.stage == program.stage), 0)
    for subject in PIPELINE[start:]:
        if program.stage >= until:
            break
        if isinstance(subject, Reach) and fuel.empty and not _keeps_promise(program, subject.stage):
            break  # what the matches that fuel didn't allow have left undone
        _run(subject, program, fuel, dumper, watch)
    return program


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    *,
    dump: Path | Dump | None = None,
    watch: Callable[[Pass, PassResult], None] = lambda subject, result: None,
) -> Program:
    """Run a list of passes from its first to its last, in place; `dump` and `watch` as in `run_pipeline`."""
    check_order(passes, program)
    fuel = Fuel.from_environment()
    dumper = Dump.of(dump, program)
    for subject in passes:
        _run(subject, program, fuel, dumper, watch)
    return program


def _run(
    subject: Pass,
    program: Program,
    fuel: Fuel,
    dumper: Dump | None,
    watch: Callable[[Pass, PassResult], None],
) -> None:
    result = subject(program, fuel)
    watch(subject, result)
    if dumper:
        record = program.history[-1]
        dumper.write(
            subject.name,
            program,
            f"{record.matches} matches, {record.seconds * 1e3:.0f} ms",
            *map(str, record.misses),
        )


def _keeps_promise(program: Program, stage: Stage) -> bool:
    """Whether the program is already what `stage` asks for."""
    try:
        verify(replace(program, stage=stage))
    except LlmcError:
        return False
    return True


class Dump:
    """A folder for programs as numbered Python files; one of them may go on from list of passes to list of passes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    @classmethod
    def of(cls, given: Path | Dump | None, program: Program) -> Dump | None:
        """The dump that is meant, with the program that it begins with."""
        dump = cls(given) if isinstance(given, Path) else given
        if dump is not None and not dump.count:
            dump.folder.mkdir(parents=True, exist_ok=True)
            dump.write(str(program.stage), program, program.source)
        return dump

    def write(self, title: str, program: Program, *notes: str) -> None:
        name = "".join(c if c.isalnum() else "_" for c in title).strip("_")
        text = "".join(f"# {note}\n" for note in (title, *notes)) + to_python(program)
        (self.folder / f"{self.count:02d}_{name}.py").write_text(text)
        self.count += 1
