"""The compiler's public functions, each on one screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..errors import UsageError
from ..ir.program import Program
from ..ir.stages import Stage
from ..ir.weights import cast
from ..passes.pipeline import Dump, run_passes, run_pipeline
from ..passes.quantize.rounding_plan import Override
from ..runtimes.artifact.manifest import Manifest
from ..runtimes.artifact.write import ArtifactWriter, check_output
from ..runtimes.measure.selfcheck import GateReport
from .build import Build
from .compress.cache import CalibrationCache
from .compress.calibration_text import CalibrationText
from .compress.max_kl import keep_under
from .compress.pruning import choose_layers, choose_weights
from .compress.quantization import quantize as choose_rounding
from .config import CompileConfig
from .frontend.capture import trace
from .frontend.demo import cache_dir
from .frontend.sources import ModelSource, find_source
from .gate.verify import verify as verify_artifact
from .phases import Phases, Watch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEFAULT_MAX_SEQ_LEN = 2048


def capture(
    model: str | Path | nn.Module,
    *,
    dtype: str = "fp32",
    max_seq_len: int | None = None,
    until: Stage = Stage.CANONICAL,
    dump_ir: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Program:
    """Capture a causal language model as a canonical program; no weight is read.

    Args:
        model: a hub id, a folder of safetensors, a GGUF file, a module in memory, or "demo".
        dtype: what the program computes in: fp32, fp16 or bf16.
        max_seq_len: the longest sequence to serve; by default what the model was made for, 2048 at most.
        until: the stage to bring it to.
        dump_ir: a folder for the program before and after each pass, as Python.
        trust_remote_code: run Python that the model brings along.
    """
    if dtype not in DTYPES:
        raise UsageError(
            "DTYPE_UNKNOWN", f"The dtype {dtype!r} is not one of {', '.join(DTYPES)}.", "Choose one of them."
        )
    source = find_source(model, trust_remote_code=trust_remote_code)
    program = _captured(source, source.build(DTYPES[dtype]), max_seq_len)
    return run_pipeline(program, until, dump=Path(dump_ir) if dump_ir else None)


def _captured(source: ModelSource, module: nn.Module, max_seq_len: int | None) -> Program:
    """The program of a module that `source` has built."""
    # What the module computes in, tensor by tensor: some parts stay in float32 whatever the rest is in.
    dtypes = {name: value.dtype for name, value in module.state_dict(keep_vars=True).items()}
    weights = {name: cast(weight, dtypes[name]) for name, weight in source.weights(module).items() if name in dtypes}
    if max_seq_len is None:
        max_seq_len = getattr(source.config, "max_position_embeddings", None) or DEFAULT_MAX_SEQ_LEN
        max_seq_len = min(max_seq_len, DEFAULT_MAX_SEQ_LEN)
    if max_seq_len < 1:
        raise UsageError("MAX_SEQ_LEN_INVALID", f"max_seq_len is {max_seq_len}.", "Give 1 or more.")
    return trace(module, weights, source.name, max_seq_len)


def compile(
    model: str | Path | nn.Module,
    output: str | Path,
    *,
    target: str = "ort",
    dtype: str = "fp32",
    quantize: str | None = None,
    algo: str | None = None,
    group_size: int | str | None = None,
    overrides: Sequence[Override] = (),
    calib: str | Path = "docstrings",
    calib_samples: int = 16,
    calib_length: int = 512,
    raise_share: float | None = None,
    round_prompts: bool = True,
    max_kl: float | None = None,
    prune: str | float | None = None,
    prune_algo: str | None = None,
    drop_layers: int = 0,
    kv_cache: str = "ring",
    kv_cache_dtype: str = "auto",
    max_seq_len: int | None = None,
    ops: str = "contrib",
    dump_ir: str | Path | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
    watch: Watch = lambda phase, done, total: None,
) -> Artifact:
    """Compile a causal language model into an artifact, and hold it against the model before it exists.

    Args:
        model: a hub id, a folder of safetensors, a GGUF file, a module in memory, or "demo".
        output: the artifact's folder; an older artifact there is replaced when the new one is complete.
        target, dtype, quantize, algo, group_size, overrides, raise_share, round_prompts, max_kl, prune, prune_algo,
            drop_layers, kv_cache, kv_cache_dtype, max_seq_len, ops: see `CompileConfig`.
        calib, calib_samples, calib_length: see `CalibrationText`.
        dump_ir: a folder for the program before and after each pass, as Python.
        verify: False leaves the gate out.
        trust_remote_code: run Python that the model brings along.
        watch: called with a phase, the steps of it that are done, and all of them.
    """
    config = CompileConfig(
        target=target,
        dtype=dtype,
        quantize=quantize,
        algo=algo,
        group_size=group_size,
        overrides=tuple(overrides),
        calibration=CalibrationText(str(calib), calib_samples, calib_length),
        raise_share=raise_share,
        round_prompts=round_prompts,
        max_kl=max_kl,
        prune=prune,
        prune_algo=prune_algo,
        drop_layers=drop_layers,
        kv_cache=kv_cache,
        kv_cache_dtype=kv_cache_dtype,
        max_seq_len=max_seq_len,
        ops=ops,
    )
    text = config.calibration.read() if config.reads_text else None
    output = Path(output)
    check_output(output)
    phases = Phases(watch)
    with ArtifactWriter(output) as writer, ExitStack() as stack:
        with phases("capture"):
            source = find_source(model, trust_remote_code=trust_remote_code)
            module = source.build(DTYPES[dtype])
            program = _captured(source, module, max_seq_len)
        build = Build(source, module, program, config, writer, phases, Dump(Path(dump_ir)) if dump_ir else None)
        depends_on = build.identity, config, program.max_seq_len, text and text.sha256
        cache = stack.enter_context(CalibrationCache.of(cache_dir(), *depends_on))
        if config.drop_layers:
            with phases("weigh layers"):
                build.pruning = choose_layers(source, program, config, text, cache, watch)
        with phases("passes"):
            run_passes(program, build.pruning.optimizing, dump=build.dump)
        if config.prune is not None:
            with phases("prune"):
                build.pruning = choose_weights(build.pruning, source, program, config, text, cache, watch)
                run_passes(program, build.pruning.passes, dump=build.dump)
        with phases("quantize"):
            rounding = choose_rounding(source, program, config, text, cache, watch)
        if rounding and max_kl is not None:
            rounding = keep_under(max_kl, rounding, build)
        written = build.write(rounding)
        if verify:
            build.check(written, lambda: _captured(source, module, max_seq_len))
        manifest = writer.commit(written.manifest)
        cache.clear()
    return Artifact(output, manifest, {"seconds": phases.seconds, "peak_rss_bytes": phases.peak})


@dataclass(frozen=True)
class Artifact:
    """What `compile` made.

    Attributes:
        path: its folder.
        manifest: what it says of itself.
        report: seconds and peak memory of each phase.
    """

    path: Path
    manifest: Manifest
    report: dict[str, Mapping[str, float]]

    def verify(self) -> GateReport:
        """The gate, again, on this machine."""
        return verify_artifact(self.path)
