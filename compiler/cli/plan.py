"""`llmc plan`: estimate what compiling a model needs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from . import console
from .command import json_option, model_argument, print_json
from .options import ConfigVerb, with_options
from .progress import progress

if TYPE_CHECKING:
    from ...passes.base import Pass, PassResult
    from ..inspect.plan import CompilePlan


@click.command(cls=ConfigVerb, short_help="Estimate what compiling needs, without reading weights.")
@model_argument
@click.option(
    "--max-batch-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Largest number of sequences in a batch.",
)
@json_option
@with_options("target", "dtype", "max_seq_len", "spec_tokens", "kv_cache_dtype")
def plan(
    model: str,
    target: str | None,
    max_seq_len: int | None,
    max_batch_size: int,
    dtype: str | None,
    spec_tokens: int | None,
    kv_cache_dtype: str | None,
    as_json: bool,
) -> None:
    """Estimate what compiling MODEL needs, without reading weights: coverage by the dialect, memory and disk."""
    with progress(f"capture {model}") as now:
        from ..inspect.plan import plan as make_plan

        def watch(subject: Pass, result: PassResult) -> None:
            now("passes", f"After {subject.name}: {result.matches} matches")

        made = make_plan(
            model,
            target=target,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype or "auto",
            spec_tokens=spec_tokens or 0,
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            watch=watch,
        )
    if as_json:
        print_json(_document(made))
    else:
        _show(made)


def _document(made: CompilePlan) -> dict[str, Any]:
    derived = {"total": asdict(made.total), "kv_bytes_per_token": made.kv_bytes_per_token, "kv_bytes": made.kv_bytes}
    return asdict(made) | derived


def _show(made: CompilePlan) -> None:
    covered, plain = made.coverage.dialect, made.coverage.aten
    console.facts(
        [
            ("model", made.model),
            ("computes in", made.dtype),
            ("positions", f"{made.max_seq_len:,} in {made.max_batch_size:,} sequence{'s'[: made.max_batch_size > 1]}"),
        ]
    )
    console.heading("Coverage")
    console.facts(
        [
            (f"dialect, {sum(covered.values()):,} calls", _ops(covered)),
            (f"plain ATen, {sum(plain.values()):,} calls", _ops(plain)),
        ]
    )
    if made.coverage.fallbacks:
        console.heading("Fallbacks: ATen ops that a pass examined but did not replace")
        console.table(
            ["pass", "node", "reason"], [[name, miss.node, miss.reason] for name, miss in made.coverage.fallbacks]
        )
    console.heading("Parameters, each counted once")
    rows = [
        [name, g.tensors, g.parameters, console.size(g.disk_bytes), console.size(g.bytes)]
        for name, g in _with_total(made)
    ]
    console.table(["group", "tensors", "parameters", "on disk", f"in {made.dtype}"], rows)
    console.heading("KV cache")
    limits = sorted({layer.limit for layer in made.kv_cache if layer.limit})
    windows = f"; some layers keep at most {', '.join(map(str, limits))} positions" if limits else ""
    console.facts(
        [
            ("layers with a cache", str(len(made.kv_cache))),
            ("dtype", made.dtype if made.kv_cache_dtype == "auto" else f"{made.kv_cache_dtype} with scales"),
            ("per position", console.size(made.kv_bytes_per_token)),
            (
                "full",
                f"{console.size(made.kv_bytes)} for {made.max_batch_size} x {made.max_seq_len:,} positions{windows}",
            ),
        ]
    )
    console.heading("Estimates")
    output = ", ".join(f"{name} {console.size(n)}" for name, n in made.output_bytes.items())
    largest = f"{made.largest_tensor}, {console.size(made.largest_tensor_bytes)}"
    console.facts(
        [("memory to compile", console.size(made.peak_bytes)), ("largest tensor", largest), ("output", output)]
    )
    for table in made.tables:
        console.target_table(table)
    console.heading("How the estimates are computed")
    console.facts(list(made.formulas.items()))


def _with_total(made: CompilePlan) -> list[tuple[str, Any]]:
    return [*made.groups.items(), ("total", made.total)]


def _ops(counts: dict[str, int]) -> str:
    return (
        ", ".join(f"{op.partition('.')[2] or op} {count}" for op, count in sorted(counts.items(), key=lambda x: -x[1]))
        or "none"
    )
