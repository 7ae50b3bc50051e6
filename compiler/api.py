"""The compiler's public functions, each on one screen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..errors import LlmcError
from ..passes.base import Pass, PassResult
from ..passes.check_rows import CheckRows
from ..passes.pipeline import PIPELINE, run_passes, run_pipeline
from ..passes.quantize import Quantize
from ..runtimes.artifact_writer import ArtifactWriter, check_output
from ..runtimes.manifest import Manifest
from ..runtimes.selfcheck import LIMITS, Reference, Report
from .backends.onnx.build import build_onnx
from .blame import find_divergence
from .companions import describe, save_companions, write_json
from .config import CompileConfig
from .frontend.capture import trace
from .frontend.sources import Source, find_source
from .ir.program import Program
from .ir.stages import Stage
from .ir.weights import cast
from .phases import Phases, Watch
from .verify import check_apart, gate_failed, make_reference
from .verify import verify as verify_artifact

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
        raise LlmcError(
            "DTYPE_UNKNOWN", f"The dtype {dtype!r} is not one of {', '.join(DTYPES)}.", "Choose one of them."
        )
    source = find_source(model, trust_remote_code=trust_remote_code)
    program = _captured(source, source.build(DTYPES[dtype]), max_seq_len)
    return run_pipeline(program, until, dump=Path(dump_ir) if dump_ir else None)


def _captured(source: Source, module: nn.Module, max_seq_len: int | None) -> Program:
    """The program of a module that `source` has built."""
    # What the module computes in, tensor by tensor: some parts stay in float32 whatever the rest is in.
    dtypes = {name: value.dtype for name, value in module.state_dict(keep_vars=True).items()}
    weights = {name: cast(weight, dtypes[name]) for name, weight in source.weights(module).items() if name in dtypes}
    if max_seq_len is None:
        max_seq_len = getattr(source.config, "max_position_embeddings", None) or DEFAULT_MAX_SEQ_LEN
        max_seq_len = min(max_seq_len, DEFAULT_MAX_SEQ_LEN)
    if max_seq_len < 1:
        raise LlmcError("MAX_SEQ_LEN_INVALID", f"max_seq_len is {max_seq_len}.", "Give 1 or more.")
    return trace(module, weights, source.name, max_seq_len)


def compile(
    model: str | Path | nn.Module,
    output: str | Path,
    *,
    target: str = "ort",
    dtype: str = "fp32",
    quantize: str | None = None,
    group_size: int | None = None,
    kv_cache: str = "ring",
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
        target, dtype, quantize, group_size, kv_cache, max_seq_len, ops: see `CompileConfig`.
        dump_ir: a folder for the program before and after each pass, as Python.
        verify: False leaves the gate out.
        trust_remote_code: run Python that the model brings along.
        watch: called with a phase, the steps of it that are done, and all of them.
    """
    config = CompileConfig(target, dtype, quantize, group_size, kv_cache, max_seq_len, ops)
    output = Path(output)
    check_output(output)
    phases = Phases(watch)
    with ArtifactWriter(output) as writer:
        with phases("capture"):
            source = find_source(model, trust_remote_code=trust_remote_code)
            module = source.build(DTYPES[dtype])
            program = _captured(source, module, max_seq_len)
        with phases("passes"):
            rounded: list[Program] = []

            def keep_rounded(subject: Pass, result: PassResult) -> None:
                if isinstance(subject, Quantize):
                    rounded.append(program.copy())

            passes = [*PIPELINE, *config.engine_passes()]
            run_passes(program, passes, dump=Path(dump_ir) if dump_ir else None, watch=keep_rounded)
        with phases("write"):
            names = iter(range(len(program.weights)))
            graphs = build_onnx(
                program,
                writer.folder,
                ops=ops,
                prefill=config.rounds_prefill,
                watch=lambda name: watch("write", next(names, 0), len(program.weights)),
            )
            save_companions(source, program, writer.folder)
            manifest = describe(source, module, program, config, graphs)
        if verify:
            with phases("reference"):
                reference = make_reference(
                    source, module, program, precision=config.precision, rounded=rounded[0] if rounded else None
                )
                reference.save(writer.folder)
            with phases("gate"):
                writer.seal(manifest)
                verdict = check_apart(writer.folder)
                phases.peak["gate"] = max(phases.peak.get("gate", 0), verdict.peak_rss_bytes)
            if not verdict.report.passed:
                with phases("blame"):
                    culprit = _culprit(source, module, program.max_seq_len, config, reference)
                raise gate_failed(verdict.report, culprit)
            write_json(writer.folder / "verify.json", verdict.report.as_dict())
        manifest = writer.commit(manifest)
    return Artifact(output, manifest, {"seconds": phases.seconds, "peak_rss_bytes": phases.peak})


def _culprit(source: Source, module: nn.Module, max_seq_len: int, config: CompileConfig, reference: Reference) -> str:
    """Where what was compiled stopped being the model, in a sentence."""
    tokens = torch.from_numpy(reference.tokens)
    program = _captured(source, module, max_seq_len)
    passes = [*PIPELINE, *(p for p in config.engine_passes() if isinstance(p, (CheckRows, Quantize)))]
    found = find_divergence(program, passes, tokens, LIMITS[config.precision].model)
    if found is not None:
        return f"{found}."
    return "Every pass keeps the numbers without a cache: the cache, the ONNX graphs or their runtime change them."


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

    def verify(self) -> Report:
        """The gate, again, on this machine."""
        return verify_artifact(self.path)
