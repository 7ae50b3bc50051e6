"""lm-eval over an artifact and over its model by lm-eval's own class for transformers: what each answered.

`python with_lm_eval.py FOLDER FILE.gguf` prints a JSON list of answers for each of the two. Every kind of question is
asked: which end is likeliest, how likely a whole text is, how a text goes on.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import lm_eval

from llmc.runtimes.measure.lm_eval import harness

LINES = [
    {"start": "The capital of France is", "ends": ["Paris", "London", "Rome"], "right": 0},
    {"start": "Water freezes at zero degrees", "ends": ["Kelvin", "Celsius", "Newton"], "right": 1},
    {"start": "The opposite of hot is", "ends": ["warm", "loud", "cold"], "right": 2},
    {"start": "Two plus two is", "ends": ["four", "five", "three"], "right": 0},
    {"start": "The sun rises in the", "ends": ["north", "east", "south"], "right": 1},
]
KINDS = {
    "ends": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{start}}",
        "doc_to_choice": "{{ends}}",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{start}} {{ends[right]}}, as everybody knows.",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "continuations": {
        "output_type": "generate_until",
        "doc_to_text": "{{start}}",
        "doc_to_target": "{{ends[right]}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def main() -> None:
    folder, file = sys.argv[1], Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as made:
        data = Path(made, "lines.jsonl")
        data.write_text("\n".join(map(json.dumps, LINES)))
        given = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        tasks = [{"task": name, **given, **kind} for name, kind in KINDS.items()]
        theirs = {"pretrained": str(file.parent), "gguf_file": file.name, "dtype": "float32", "device": "cpu"}
        both = [answers(harness(folder), None, tasks), answers("hf", theirs, tasks)]
    print(json.dumps(both))


def answers(model: object, arguments: dict[str, str] | None, tasks: list[dict[str, object]]) -> list[object]:
    """All that a model said, in the order of the questions."""
    found = lm_eval.simple_evaluate(model=model, model_args=arguments, tasks=tasks, log_samples=True)
    return [said for name in KINDS for sample in found["samples"][name] for (said,) in sample["resps"]]


if __name__ == "__main__":
    main()
