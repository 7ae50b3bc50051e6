"""Measure the quality of TensorRT's neutral artifacts beside twins for ONNX Runtime that are made from the same bits.

    python examples/compare/quality_twins.py --model moved --write docs/quantization.md

A twin has the same grids, so that the same numbers are stored, and runs in float32. Both run the same windows of a
text, and their logits are compared with those of the model in transformers. No GPU is needed: the neutral artifact runs
in ONNX Runtime, which rounds each result to the precision of the engine. Results are stored under CACHE, as those of
quality.py are.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from environments import HERE
from machine import describe
from prepare import DEFAULT_CACHE, LLMC_MAX_SEQ_LEN, make_folder, prepare, recipe_key
from quality import TITLES
from quality_reference import ReferenceLogits, fingerprint
from report import around_section, replace_section

import llmc
from llmc.compiler.targets.registry import find_target
from llmc.runtimes.engines.cores import physical_cores

SECTION = "twins"
# A precision -> the options of the artifact for TensorRT. Only quantized weights have a twin.
PRECISIONS: dict[str, dict[str, str]] = {
    "fp16": {"dtype": "fp16"},
    "bf16": {"dtype": "bf16"},
    **{scheme: {"quantize": scheme} for scheme in ("int8", "int4", "w8a8", "fp8")},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(TITLES), default="moved")
    parser.add_argument("--only", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--text", default="topics", help="docstrings, topics or a file; llmc calibrates on docstrings")
    parser.add_argument("--max-tokens", type=int, default=8192, metavar="N", help="use at most N tokens of the text")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder for models and results")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the section between this page's markers")
    args = parser.parse_args()
    if args.write:
        around_section(args.write, SECTION)  # fail now, not after an hour, if the page has no markers
    cache = args.cache.resolve()
    prepare(args.model, [], cache)
    home = cache / "models" / args.model
    reference = ReferenceLogits(home / "hf", args.text, args.max_tokens)
    rows = []
    for name in args.only:
        found = [_measured(name, target, home, cache / "quality" / args.model, reference) for target in ("trt", "ort")]
        rows.append((name, *found))
    text = _table(rows, args.model, reference)
    print(text)
    if args.write:
        replace_section(args.write, text, SECTION)


def _measured(
    precision: str, target: str, home: Path, results: Path, reference: ReferenceLogits
) -> dict[str, Any] | None:
    options = PRECISIONS[precision]
    if target == "ort" and "quantize" not in options:
        return None
    folder = home / "twins" / precision / target
    key = f"{recipe_key('llmc')} {options}"
    print(f"{target} {precision}: compiling", file=sys.stderr, flush=True)
    make_folder(folder, lambda out: _compile(home / "hf", out, target, options), key)
    script = "quality_peer_neutral.py" if target == "trt" else "quality_peer_llmc.py"
    mark = fingerprint("llmc", folder, [script])
    command = [sys.executable, HERE / script, folder, f"--threads={physical_cores()}"]
    return reference.measured(f"twins-{target}-{precision}", mark, results, command)


def _compile(hf: Path, out: Path, target: str, options: dict[str, str]) -> None:
    if target == "trt":
        llmc.compile(hf, out, target=target, max_seq_len=LLMC_MAX_SEQ_LEN, engine=False, **options)
        return
    twin, facts = type(find_target(target)), find_target("trt").facts
    own = twin.facts_for
    # The same grids for all weights, and for those that are stored in more bits.
    same = replace(find_target(target).facts, schemes=facts.schemes, promotion=facts.promotion)
    twin.facts_for = lambda self, config: same
    try:
        llmc.compile(hf, out, target=target, max_seq_len=LLMC_MAX_SEQ_LEN, **options)
    finally:
        twin.facts_for = own


def _table(
    rows: list[tuple[str, dict[str, Any] | None, dict[str, Any] | None]], model: str, reference: ReferenceLogits
) -> str:
    lines = [
        f"`examples/compare/quality_twins.py --model {model}`, {datetime.date.today().isoformat()}, "
        f"{describe(physical_cores())}. {TITLES[model]}; {reference.scored:,} tokens of `{reference.text.source}` "
        f"(sha256 {reference.text.sha256[:12]}).",
        "",
        "| precision | KLD, nats | twin's | ratio | perplexity, to the model's | twin's |",
        "|---|---|---|---|---|---|",
    ]
    for name, own, twin in rows:
        assert own is not None
        ratio = f"{own['kld']['mean'] / twin['kld']['mean']:.3f}" if twin else ""
        lines.append(f"| {name} | {_kld(own)} | {_kld(twin)} | {ratio} | {_ppl(own)} | {_ppl(twin)} |")
    return "\n".join(lines)


def _kld(found: dict[str, Any] | None) -> str:
    return f"{found['kld']['mean']:.3g} ± {found['kld']['stderr']:.1g}" if found else ""


def _ppl(found: dict[str, Any] | None) -> str:
    return f"{found['ratio']['value']:.4f} ± {found['ratio']['stderr']:.1g}" if found else ""


if __name__ == "__main__":
    main()
