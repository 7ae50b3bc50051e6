"""Run lm-eval on an artifact and on its model.

The model runs by lm-eval's own class for transformers. `python with_lm_eval.py FOLDER FILE.gguf` prints two JSON lists
of answers. The tasks cover every kind of request: the likeliest ending, the likelihood of a whole text, and the
continuation of a text.
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
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary, "lines.jsonl")
        data.write_text("\n".join(map(json.dumps, LINES)))
        dataset = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        tasks = [{"task": name, **dataset, **kind} for name, kind in KINDS.items()]
        model = {"pretrained": str(file.parent), "gguf_file": file.name, "dtype": "float32", "device": "cpu"}
        both = [answers(harness(folder), None, tasks), answers("hf", model, tasks)]
    print(json.dumps(both))


def answers(model: object, arguments: dict[str, str] | None, tasks: list[dict[str, object]]) -> list[object]:
    """Return all answers of a model, in the order of the questions."""
    results = lm_eval.simple_evaluate(model=model, model_args=arguments, tasks=tasks, log_samples=True)
    return [answer for name in KINDS for sample in results["samples"][name] for (answer,) in sample["resps"]]


if __name__ == "__main__":
    main()
