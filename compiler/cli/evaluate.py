"""`llmc eval`: how well an artifact predicts a text, and how far it is from a reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import console
from .command import Verb, artifact_argument, json_option, print_json, threads_option
from .progress import steps

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...runtimes.engines.ort.layers import WatchedGraph
    from ...runtimes.measure.evaluate import Estimate, Evaluation, ReferencePredictions
    from ...runtimes.measure.layers import LayerErrors
    from ...runtimes.measure.texts import Text
    from ...runtimes.measure.windows import Window

# Over some thousand tokens a layer's error is known well enough; what leaves all layers is in memory for a window.
_LAYER_WINDOWS = 4
_PERCENTILES = ("p1", "p5", "p10", "p90", "p95", "p99")


@click.command("eval", cls=Verb, short_help="Perplexity of an artifact, and its distance from a reference.")
@artifact_argument
@click.option(
    "--text",
    "source",
    default="docstrings",
    show_default=True,
    metavar="F",
    help='A text file, a .jsonl file with texts under "text", or a text of Python\'s own: docstrings, topics.',
)
@click.option("--reference", metavar="MODEL|DIR", help="Compare with a model, or with another artifact.")
@click.option(
    "--window", type=click.IntRange(min=2), metavar="N", help="Tokens of a sequence.  [default: 512, if it serves them]"
)
@click.option(
    "--stride", type=click.IntRange(min=1), metavar="N", help="Tokens between windows.  [default: half a window]"
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=2),
    default=16384,
    show_default=True,
    metavar="N",
    help="Read that many tokens of the text at most.",
)
@click.option("--per-position", is_flag=True, help="Show the divergence by the number of tokens before.")
@click.option(
    "--per-layer",
    is_flag=True,
    help=f"Show how far what leaves each layer is from the reference's, in the first {_LAYER_WINDOWS} windows.",
)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Draw the divergence as SVG, too."
)
@json_option
@threads_option
def evaluate(
    artifact: Path,
    source: str,
    reference: str | None,
    window: int | None,
    stride: int | None,
    max_tokens: int,
    per_position: bool,
    per_layer: bool,
    plot: Path | None,
    as_json: bool,
    threads: int | None,
) -> None:
    """Measure how well the artifact in DIR predicts a text: its perplexity, and how far its predictions are from those
    of a reference: the MODEL that it was made from, or another artifact of that. Each number comes with its error.

    A model's own predictions are kept for the next time, 2 bytes for each token of the text and of the vocabulary.
    """
    if reference is None and (per_position or per_layer or plot):
        raise click.UsageError("--per-position, --per-layer and --plot compare: give a --reference, too.")
    if plot and not plot.parent.is_dir():
        raise click.BadParameter(f"There is no folder {str(plot.parent)!r}.", param_hint="--plot")
    with steps(f"read {source}") as watch:
        from ...runtimes.artifact.open import read_manifest
        from ...runtimes.engines.load import load
        from ...runtimes.generate.tokenizer import Tokenizer
        from ...runtimes.measure.evaluate import evaluate as measure
        from ...runtimes.measure.evaluation_plot import svg
        from ...runtimes.measure.texts import read_text
        from ...runtimes.measure.windows import cut_windows, opening

        manifest = read_manifest(artifact)
        text = read_text(source)
        tokenizer = Tokenizer(artifact)
        tokens = tokenizer.encode(text.content, add_special_tokens=False)[:max_tokens]
        watched = _watched(artifact) if per_layer else None
        windows = cut_windows(tokens, manifest.max_seq_len, window, stride, opening(tokenizer))
        # Before the engine is there: both are large.
        other = _reference(reference, windows, int(manifest.model["vocab_size"]), watch) if reference else None
        watch(f"load {artifact}", 0, 0)
        result = measure(load(artifact, threads=threads), windows, other, watch)
        other = None
        layers = _layers(artifact, watched, reference, windows, threads, watch) if watched and reference else None
    if plot:
        plot.write_text(svg(result, f"{manifest.model['name']}, {artifact.name} against {reference}"), encoding="utf-8")
    if as_json:
        by_position = {"per_position": result.by_position()} if per_position else {}
        by_layer = {"per_layer": layers.as_dict()} if layers else {}
        print_json(result.as_dict() | {"text": {"sha256": text.sha256, "source": text.source}} | by_position | by_layer)
    else:
        _show(result, text, per_position, layers)


def _reference(
    given: str, windows: list[Window], vocab_size: int, watch: Callable[[str, int, int], None]
) -> ReferencePredictions:
    if _is_artifact(given):
        from ...runtimes.engines.load import load
        from ...runtimes.measure.evaluate import EngineReference

        return EngineReference(load(given), windows)
    from ..gate.reference_logits import reference_of

    return reference_of(given, windows, vocab_size, watch=watch)


def _is_artifact(given: str) -> bool:
    from ...runtimes.artifact.manifest import MANIFEST

    return (Path(given) / MANIFEST).is_file()


def _watched(artifact: Path) -> dict[str, WatchedGraph]:
    """What has no layers to be watched is refused before any work."""
    from ...runtimes.artifact.open import open_artifact
    from ..targets.ort.layer_outputs import watch_layers

    return watch_layers(artifact, open_artifact(artifact))


def _layers(
    artifact: Path,
    watched: dict[str, WatchedGraph],
    reference: str,
    windows: list[Window],
    threads: int | None,
    watch: Callable[[str, int, int], None],
) -> LayerErrors:
    from ...runtimes.artifact.open import read_manifest
    from ...runtimes.engines.ort.layers import WatchedEngine
    from ...runtimes.measure.layers import measure_layers
    from ..gate.layer_outputs import artifact_layers, model_layers

    windows = windows[:_LAYER_WINDOWS]
    if _is_artifact(reference):
        known = artifact_layers(Path(reference), windows, watch=watch)
    else:
        names = dict.fromkeys(name for graph in watched.values() for name in graph.values)
        known = model_layers(reference, names, windows, watch=watch)
    engine = WatchedEngine(artifact, read_manifest(artifact), watched, threads=threads)
    return measure_layers(engine, known, windows, watch)


def _show(result: Evaluation, text: Text, per_position: bool, layers: LayerErrors | None) -> None:
    rows = [_row("perplexity", result.perplexity)]
    if result.ratio and result.kld and result.same_top1 and result.same_top5 and result.probability_change:
        kld, change = result.kld, result.probability_change
        rows += [
            _row("perplexity / reference's", result.ratio),
            ("KL divergence, nats", f"{kld.mean:.4g}", _error(kld.stderr)),
            *((f"  {name}", f"{getattr(kld, name):.4g}", "") for name in ("median", "p90", "p99", "max")),
            _row("same best token", result.same_top1),
            _row("its best among five", result.same_top5),
            ("change of probability", f"{change.mean:+.4g}", _error(change.stderr)),
            ("  rms", f"{change.rms:.4g}", ""),
            *((f"  {name}", f"{getattr(change, name):+.4g}", "") for name in _PERCENTILES),
        ]
    console.table(["measure", "value", "± error"], rows)
    if per_position:
        found = [
            (f"{one['from']}..{one['to'] - 1}", one["tokens"], f"{one['kld']:.4g}") for one in result.by_position()
        ]
        click.echo()
        console.table(["tokens before", "tokens", "KL divergence"], found)
    if layers:
        _show_layers(layers)
    click.echo()
    where = f"{_count(result.tokens, result.windows)} of {text.source} (sha256 {text.sha256[:12]})"
    click.echo(f"{where}; layers over {_count(layers.tokens, layers.windows)}" if layers else where)


def _show_layers(layers: LayerErrors) -> None:
    measured = [layer for layer in layers.layers if layer.why is None]
    rows = [
        (layer.name, f"{layer.error:.3g}", f"{layer.median:.3g}", "" if layer.added is None else f"{layer.added:.3g}")
        for layer in measured
    ]
    click.echo()
    console.table(["leaves layer", "error", "median token", "added here"], rows)
    for layer in layers.layers:
        if layer.why is not None:
            console.paragraph(f"{layer.name} is not measured: {layer.why}.")


def _count(tokens: int, windows: int) -> str:
    return f"{tokens:,} tokens in {windows:,} window{'s'[: windows > 1]}"


def _row(name: str, measured: Estimate) -> tuple[str, str, str]:
    return name, f"{measured.value:.5g}", _error(measured.stderr)


def _error(stderr: Any) -> str:
    return "" if stderr is None else f"{stderr:.2g}"
