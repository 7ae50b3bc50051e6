"""`llmc bench`: measure the speed of artifacts on this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from .command import Verb, print_json, threads_option
from .progress import steps

if TYPE_CHECKING:
    from ...runtimes.artifact.manifest import Manifest
    from ...runtimes.engines.base import Engine


@click.command(cls=Verb, short_help="Measure prefill and decode speed, latency and memory of artifacts.")
@click.argument("artifacts", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
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
@click.option(
    "--trace",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also write a trace of the last time that the workload is served, for ui.perfetto.dev.",
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
    artifacts: tuple[Path, ...],
    prompt: int,
    tokens: int,
    repeats: int,
    concurrency: int,
    workload: str | None,
    rate: float | None,
    trace: Path | None,
    profile: bool,
    threads: int | None,
    output_format: str,
    plot: Path | None,
) -> None:
    """Measure the artifacts in one or more DIRs with random tokens, as llama-bench does. Each test has one warm-up run.

    Several artifacts are loaded at the same time and take turns: each runs a test once before the first one runs it
    again. So other load on the machine affects all of them.

    With --workload, requests of mixed lengths come and go, at most --concurrency at once, and the whole workload is
    served --repeats times. A line of a file is an object with "prompt_tokens", "new_tokens" and optionally "at_s", the
    second of its arrival.
    """
    if workload is not None:
        if profile or plot or output_format == "csv":
            raise click.UsageError("--workload has no --profile, no --plot and no CSV. Leave them out.")
        _check_folder(trace, "--trace")
        if trace and len(artifacts) > 1:
            raise click.UsageError("--trace records one artifact, not several in turn. Give one DIR.")
        _serve(artifacts, workload, rate, repeats, concurrency, threads, trace, output_format == "json")
        return
    if rate is not None:
        raise click.UsageError("--rate is for random requests. Set --workload N, too.")
    if trace:
        raise click.UsageError("--trace records a workload. Set --workload, too.")
    if not prompt and not tokens:
        raise click.UsageError("There is nothing to measure. Set -p or -n to more than 0.")
    _check_folder(plot, "--plot")
    with steps(f"load {artifacts[0]}") as watch:
        from ...runtimes.measure.bench import bench as measure
        from ...runtimes.measure.bench_plot import svg
        from ...runtimes.measure.bench_report import as_csv, markdown, markdown_of_several

        loaded = _load(artifacts, threads, concurrency, watch)
        results = measure(
            [one.engine for one in loaded], prompt, tokens, repeats, concurrency, profile=profile, watch=watch
        )
    named = [
        (one.name, replace(result, load_s=one.load_s, threads=one.engine.spec.threads))
        for one, result in zip(loaded, results, strict=True)
    ]
    if plot:
        plot.write_text(svg(named), encoding="utf-8")
    if output_format == "csv":
        click.echo(as_csv(named), nl=False)
    elif output_format == "json":
        _print_documents([(name, result.as_dict()) for name, result in named])
    else:
        click.echo(markdown(named[0][1], named[0][0]) if len(named) == 1 else markdown_of_several(named), nl=False)


def _check_folder(file: Path | None, flag: str) -> None:
    if file and not file.parent.is_dir():
        raise click.BadParameter(f"There is no folder {str(file.parent)!r}.", param_hint=flag)


def _serve(
    artifacts: Sequence[Path],
    workload: str,
    rate: float | None,
    repeats: int,
    concurrency: int,
    threads: int | None,
    trace: Path | None,
    as_json: bool,
) -> None:
    with steps(f"load {artifacts[0]}") as watch:
        from ...runtimes.measure.bench_report import workload_markdown, workload_markdown_of_several
        from ...runtimes.measure.trace import Recorder
        from ...runtimes.measure.workload import measure_workload, read_workload, seeded_workload

        if rate is not None and not workload.isdecimal():
            raise click.UsageError("--rate is for random requests; a file has its own arrivals. Leave it out.")
        loaded = _load(artifacts, threads, concurrency, watch)
        engines = [one.engine for one in loaded]
        # All artifacts get the same requests, so their tokens must be in every vocabulary.
        vocab_size = min(engine.spec.vocab_size for engine in engines)
        if workload.isdecimal():
            arrivals = seeded_workload(int(workload), vocab_size, rate)
        else:
            arrivals = read_workload(Path(workload), vocab_size)
        recorder = Recorder() if trace else None
        results = measure_workload(engines, arrivals, repeats, concurrency, recorder=recorder, watch=watch)
    if trace and recorder:
        trace.write_text(json.dumps(recorder.document()), encoding="utf-8")
    named = [(one.name, result) for one, result in zip(loaded, results, strict=True)]
    if as_json:
        _print_documents([(name, result.as_dict()) for name, result in named])
    elif len(named) == 1:
        click.echo(workload_markdown(results[0], named[0][0]), nl=False)
    else:
        click.echo(workload_markdown_of_several(named), nl=False)


class _Loaded(NamedTuple):
    """An artifact that is open, its name in the output, and how long loading took."""

    name: str
    engine: Engine
    load_s: float


def _load(
    artifacts: Sequence[Path], threads: int | None, concurrency: int, watch: Callable[[str, int, int], None]
) -> list[_Loaded]:
    from ...runtimes.artifact.open import read_manifest
    from ...runtimes.engines.load import load

    # All manifests first: a wrong folder is found before anything is loaded.
    manifests = [read_manifest(artifact) for artifact in artifacts]
    names = [_description(manifests[0])] if len(artifacts) == 1 else _folder_names(artifacts)
    loaded = []
    for artifact, name in zip(artifacts, names, strict=True):
        watch(f"load {artifact}", 0, 0)
        began = time.perf_counter()
        engine = load(artifact, threads=threads, slots=concurrency)
        loaded.append(_Loaded(name, engine, time.perf_counter() - began))
    return loaded


def _description(manifest: Manifest) -> str:
    scheme = manifest.quantization.scheme if manifest.quantization else None
    return ", ".join(filter(None, [manifest.model.name, manifest.target, scheme]))


def _folder_names(artifacts: Sequence[Path]) -> list[str]:
    """Return the names of folders, or their paths as given if two have the same name."""
    names = [artifact.resolve().name for artifact in artifacts]
    return names if len({*names}) == len(names) else [str(artifact) for artifact in artifacts]


def _print_documents(documents: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Print the document of one artifact, or one with those of several and their names."""
    if len(documents) == 1:
        print_json(documents[0][1])
    else:
        print_json({"artifacts": [{"artifact": name} | document for name, document in documents]})
