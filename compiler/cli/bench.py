"""`llmc bench`: measure the speed of an artifact on this machine."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .command import Verb, artifact_argument, print_json, threads_option
from .progress import steps

if TYPE_CHECKING:
    from ...runtimes.artifact.manifest import Manifest


@click.command(cls=Verb, short_help="Measure prefill and decode speed, latency and memory of an artifact.")
@artifact_argument
@click.option(
    "-p", "--prompt", type=click.IntRange(min=0), default=512, show_default=True, help="Tokens to prefill; 0: none."
)
@click.option(
    "-n", "--tokens", type=click.IntRange(min=0), default=128, show_default=True, help="Tokens to decode; 0: none."
)
@click.option(
    "-r", "--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Measured runs of each test."
)
@click.option(
    "--concurrency", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="Sequences in a batch."
)
@click.option(
    "--workload",
    metavar="N|FILE",
    help="Serve requests instead: N random ones of mixed lengths, or those of a JSON-lines file.",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    metavar="R",
    help="Mean arrivals a second of the N random requests.  [default: all at once]",
)
@click.option("--profile", is_flag=True, help="Also run each test under a profiler and print the time by kernel.")
@threads_option
@click.option(
    "--output-format",
    type=click.Choice(["md", "csv", "json"]),
    default="md",
    show_default=True,
    help="Format of the result.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also write a chart of the rates as SVG.",
)
def bench(
    artifact: Path,
    prompt: int,
    tokens: int,
    repeats: int,
    concurrency: int,
    workload: str | None,
    rate: float | None,
    profile: bool,
    threads: int | None,
    output_format: str,
    plot: Path | None,
) -> None:
    """Measure the artifact in DIR with random tokens, as llama-bench does. Each test has one warm-up run.

    With --workload, requests of mixed lengths come and go, at most --concurrency at once. A line of a file is an object
    with "prompt_tokens", "new_tokens" and optionally "at_s", the second of its arrival.
    """
    if workload is not None:
        if profile or plot or output_format == "csv":
            raise click.UsageError("--workload has no --profile, no --plot and no CSV. Leave them out.")
        _serve(artifact, workload, rate, concurrency, threads, output_format == "json")
        return
    if rate is not None:
        raise click.UsageError("--rate is for random requests. Set --workload N, too.")
    if not prompt and not tokens:
        raise click.UsageError("There is nothing to measure. Set -p or -n to more than 0.")
    if plot and not plot.parent.is_dir():
        raise click.BadParameter(f"There is no folder {str(plot.parent)!r}.", param_hint="--plot")
    with steps(f"load {artifact}") as watch:
        from ...runtimes.artifact.open import read_manifest
        from ...runtimes.engines.load import load
        from ...runtimes.measure.bench import bench as measure
        from ...runtimes.measure.bench_plot import svg
        from ...runtimes.measure.bench_report import as_csv, markdown

        name = _name(read_manifest(artifact))
        began = time.perf_counter()
        engine = load(artifact, threads=threads, slots=concurrency)
        load_s = time.perf_counter() - began
        result = measure(engine, prompt, tokens, repeats, concurrency, profile=profile, watch=watch)
    result = replace(result, load_s=load_s, threads=engine.spec.threads)
    if plot:
        plot.write_text(svg(result, name), encoding="utf-8")
    if output_format == "json":
        print_json(result.as_dict())
    else:
        click.echo(markdown(result, name) if output_format == "md" else as_csv(result), nl=False)


def _serve(
    artifact: Path, workload: str, rate: float | None, concurrency: int, threads: int | None, as_json: bool
) -> None:
    with steps(f"load {artifact}") as watch:
        from ...runtimes.artifact.open import read_manifest
        from ...runtimes.engines.load import load
        from ...runtimes.measure.bench_report import workload_markdown
        from ...runtimes.measure.workload import read_workload, seeded_workload, serve_workload

        if rate is not None and not workload.isdecimal():
            raise click.UsageError("--rate is for random requests; a file has its own arrivals. Leave it out.")
        name = _name(read_manifest(artifact))
        engine = load(artifact, threads=threads, slots=concurrency)
        vocab_size = engine.spec.vocab_size
        if workload.isdecimal():
            arrivals = seeded_workload(int(workload), vocab_size, rate)
        else:
            arrivals = read_workload(Path(workload), vocab_size)
        watch("warm-up", 0, 0)
        serve_workload(engine, seeded_workload(2 * concurrency, vocab_size), concurrency)
        watch("workload", 0, 0)
        result = serve_workload(engine, arrivals, concurrency)
    if as_json:
        print_json(result.as_dict())
    else:
        click.echo(workload_markdown(result, name), nl=False)


def _name(manifest: Manifest) -> str:
    scheme = manifest.quantization.scheme if manifest.quantization else None
    return ", ".join(filter(None, [manifest.model.name, manifest.target, scheme]))
