"""`llmc eval`: measure how well an artifact predicts a text, and its divergence from a reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import console
from .command import Verb, artifact_argument, json_option, print_json, threads_option
from .progress import steps

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...runtimes.engines.base import LayerEngine
    from ...runtimes.measure.evaluate import Estimate, Evaluation, ReferencePredictions
    from ...runtimes.measure.layers import LayerErrors
    from ...runtimes.measure.texts import Text
    from ...runtimes.measure.windows import Window

# Some thousand tokens are enough for the error of a layer. The outputs of all layers are in memory for one window.
_LAYER_WINDOWS = 4
_PERCENTILES = ("p1", "p5", "p10", "p90", "p95", "p99")


@click.command(
    "eval", cls=Verb, short_help="Measure the perplexity of an artifact, and its divergence from a reference."
)
@artifact_argument
@click.option(
    "--text",
    "source",
    default="docstrings",
    show_default=True,
    metavar="F",
    help='A text file, a .jsonl file with texts under "text", or a built-in text: docstrings, topics.',
)
@click.option("--reference", metavar="MODEL|DIR", help="Compare with a model, or with another artifact.")
@click.option(
    "--window",
    type=click.IntRange(min=2),
    metavar="N",
    help="Tokens of a window.  [default: 512, or the longest sequence if that is shorter]",
)
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens from one window to the next.  [default: half a window]",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=2),
    default=16384,
    show_default=True,
    metavar="N",
    help="Use only the first N tokens of the text.",
)
@click.option("--per-position", is_flag=True, help="Also show the divergence by position in the window.")
@click.option(
    "--per-layer",
    is_flag=True,
    help=f"Also show the error of each layer's output, over the first {_LAYER_WINDOWS} windows.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also write a chart of the divergence as SVG.",
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
    """Measure how well the artifact in DIR predicts a text: its perplexity, and with --reference the divergence of its
    predictions from those of a reference. The reference is the model that the artifact was compiled from, or another
    artifact of that model. Standard errors are shown.

    The predictions of a reference model are cached on disk. They take 2 bytes x tokens of the text x vocabulary size.
    """
    if reference is None and (per_position or per_layer or plot):
        raise click.UsageError("--per-position, --per-layer and --plot need a reference: give a --reference.")
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
        # First, since this refuses an artifact without measurable layers.
        layer_engine = _open_layers(artifact, threads) if per_layer else None
        windows = cut_windows(tokens, manifest.max_seq_len, window, stride, opening(tokenizer))
        # Before the engine is loaded, since both need much memory.
        other = _reference(reference, windows, manifest.model.vocab_size, watch) if reference else None
        watch(f"load {artifact}", 0, 0)
        result = measure(load(artifact, threads=threads), windows, other, watch)
        other = None
        layers = _layers(layer_engine, reference, windows, watch) if layer_engine and reference else None
    if plot:
        plot.write_text(svg(result, f"{manifest.model.name}, {artifact.name} against {reference}"), encoding="utf-8")
    if as_json:
        by_position = {"per_position": result.by_position()} if per_position else {}
        by_layer = {"per_layer": layers.as_dict()} if layers else {}
        print_json(result.as_dict() | {"text": {"sha256": text.sha256, "source": text.source}} | by_position | by_layer)
    else:
        _show(result, text, per_position, layers)


def _reference(
    model: str, windows: list[Window], vocab_size: int, watch: Callable[[str, int, int], None]
) -> ReferencePredictions:
    if _is_artifact(model):
        from ...runtimes.engines.load import load
        from ...runtimes.measure.evaluate import EngineReference

        return EngineReference(load(model), windows)
    from ..gate.reference_logits import reference_of

    return reference_of(model, windows, vocab_size, watch=watch)


def _is_artifact(path: str) -> bool:
    from ...runtimes.artifact.manifest import MANIFEST

    return (Path(path) / MANIFEST).is_file()


def _open_layers(artifact: Path, threads: int | None) -> LayerEngine:
    from ..gate.layer_outputs import open_layers

    return open_layers(artifact, threads=threads)


def _layers(
    engine: LayerEngine, reference: str, windows: list[Window], watch: Callable[[str, int, int], None]
) -> LayerErrors:
    from ...runtimes.measure.layers import measure_layers
    from ..gate.layer_outputs import artifact_layers, model_layers

    windows = windows[:_LAYER_WINDOWS]
    if _is_artifact(reference):
        outputs = artifact_layers(Path(reference), windows, watch=watch)
    else:
        outputs = model_layers(reference, engine.layers, windows, watch=watch)
    return measure_layers(engine, outputs, windows, watch)


def _show(result: Evaluation, text: Text, per_position: bool, layers: LayerErrors | None) -> None:
    lines = [_line("perplexity", result.perplexity)]
    if result.ratio and result.kld and result.same_top1 and result.same_top5 and result.probability_change:
        kld, change = result.kld, result.probability_change
        lines += [
            _line("perplexity / reference's", result.ratio),
            ("KL divergence, nats", f"{kld.mean:.4g}", _error(kld.stderr)),
            *((f"  {name}", f"{getattr(kld, name):.4g}", "") for name in ("median", "p90", "p99", "max")),
            _line("same best token", result.same_top1),
            _line("best token in top five", result.same_top5),
            ("change of probability", f"{change.mean:+.4g}", _error(change.stderr)),
            ("  rms", f"{change.rms:.4g}", ""),
            *((f"  {name}", f"{getattr(change, name):+.4g}", "") for name in _PERCENTILES),
        ]
    console.table(["measure", "value", "± error"], lines)
    if per_position:
        ranges = [
            (f"{one['from']}..{one['to'] - 1}", one["tokens"], f"{one['kld']:.4g}") for one in result.by_position()
        ]
        click.echo()
        console.table(["position", "tokens", "KL divergence"], ranges)
    if layers:
        _show_layers(layers)
    click.echo()
    measured = f"{_count(result.tokens, result.windows)} of {text.source} (sha256 {text.sha256[:12]})"
    click.echo(f"{measured}; layers over {_count(layers.tokens, layers.windows)}" if layers else measured)


def _show_layers(layers: LayerErrors) -> None:
    measured = [layer for layer in layers.layers if layer.why is None]
    lines = [
        (layer.name, f"{layer.error:.3g}", f"{layer.median:.3g}", "" if layer.added is None else f"{layer.added:.3g}")
        for layer in measured
    ]
    click.echo()
    console.table(["output of", "error", "median token", "added here"], lines)
    for layer in layers.layers:
        if layer.why is not None:
            console.paragraph(f"{layer.name} is not measured: {layer.why}.")


def _count(tokens: int, windows: int) -> str:
    return f"{tokens:,} tokens in {windows:,} window{'s'[: windows > 1]}"


def _line(name: str, measured: Estimate) -> tuple[str, str, str]:
    return name, f"{measured.value:.5g}", _error(measured.stderr)


def _error(stderr: Any) -> str:
    return "" if stderr is None else f"{stderr:.2g}"
