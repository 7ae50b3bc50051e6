"""Show an artifact, for `llmc inspect`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...errors import LlmcError
from . import console
from .command import as_json, exit_with, print_json
from .verify import show_checks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...runtimes.artifact.manifest import CacheSpec, Manifest
    from ..targets.base import Table


def inspect_artifact(ctx: click.Context, folder: Path, json_wanted: bool) -> None:
    """Show an artifact; if it is damaged or can't run on this machine, exit with that error at the end."""
    from ...runtimes.artifact.open import open_artifact, read_manifest
    from ..targets.registry import find_target

    manifest = read_manifest(folder)
    gate = _gate(folder)
    tables: Sequence[Table] = ()
    try:
        tables = find_target(manifest.target).tables(folder, manifest)
        open_artifact(folder, check_files=False)
        refusal = None
    except LlmcError as error:
        refusal = error
    if json_wanted:
        document: dict[str, Any] = {"path": str(folder), **asdict(manifest)}
        document |= {"bytes": _total(manifest), "cache_bytes": sum(cache.nbytes for cache in manifest.caches)}
        document["details"] = [asdict(table) for table in tables]
        print_json(document | {"verify": gate} | ({"error": as_json(refusal)} if refusal else {}))
    else:
        _show(manifest)
        for table in tables:
            console.target_table(table)
        _show_gate(gate)
    if refusal:
        exit_with(ctx, refusal)


def _gate(folder: Path) -> Any:
    try:
        return json.loads((folder / "verify.json").read_bytes())
    except (OSError, ValueError):
        return None


def _total(manifest: Manifest) -> int:
    return sum(file.bytes for file in manifest.files.values())


def _show(manifest: Manifest) -> None:
    model = manifest.model
    console.facts(
        [
            (
                "model",
                f"{model.name} ({model.type}), {model.parameters:,} parameters, {model.layers} layers",
            ),
            ("identity", model.identity),
            ("target", manifest.target),
            ("computes in", manifest.dtype),
            ("positions", f"{manifest.max_seq_len:,}"),
            ("quantization", console.weights(manifest.quantization) if manifest.quantization else "none"),
            *([("note", manifest.quantization.why)] if manifest.quantization and manifest.quantization.why else []),
            ("built with", _pairs(manifest.built_with)),
            *([("needs", _needs(manifest))] if manifest.requires else []),
        ]
    )
    console.heading("Files")
    rows = [[name, console.size(file.bytes), file.sha256[:12]] for name, file in manifest.files.items()]
    console.table(["file", "size", "sha256"], [*rows, ["all", console.size(_total(manifest)), ""]])
    console.heading("Graphs")
    console.table(
        ["graph", "tokens at a time"],
        [[name, _range(phase.min_tokens, phase.max_tokens)] for name, phase in manifest.phases.items()],
    )
    console.heading(f"Caches of one sequence, {console.size(sum(cache.nbytes for cache in manifest.caches))}")
    console.table(
        ["layers", "kind", "positions", "heads", "key and value", "dtype", "size"],
        [
            [count, *shown, console.size(count * nbytes)]
            for (*shown, nbytes), count in Counter(map(_as_shown, manifest.caches)).items()
        ],
    )


def _needs(manifest: Manifest) -> str:
    return ", ".join(f"{module}{wanted}" for module, wanted in manifest.requires.items())


def _as_shown(cache: CacheSpec) -> tuple[str | int, str | int, str | int, str | int, str | int, int]:
    dims = f"{cache.key_dim} and {cache.value_dim}"
    dtype = f"{cache.dtype} with a scale per {cache.scales}" if cache.is_quantized else cache.dtype
    positions = f"{cache.length - cache.slack} + {cache.slack}" if cache.slack else cache.length
    return cache.kind, positions, cache.heads, dims, dtype, cache.nbytes


def _range(least: int, most: int | None) -> str:
    if most is None:
        return f"{least} or more"
    return str(least) if least == most else f"{least} to {most}"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _show_gate(gate: Any) -> None:
    console.heading("Verification when it was compiled")
    try:
        show_checks(gate["checks"])
    except (KeyError, TypeError, ValueError):  # written by another version of llmc
        click.echo("none" if gate is None else json.dumps(gate))
