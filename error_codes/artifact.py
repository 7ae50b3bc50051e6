"""Codes of plain `LlmcError` about artifacts, texts and the machine."""

from __future__ import annotations

# Code -> when it occurs, what to do.
ARTIFACT: dict[str, tuple[str, str]] = {
    "ARTIFACT_DAMAGED": (
        "A file of the artifact is missing, has the wrong size, or was changed.",
        "Copy the artifact again, or compile the model again.",
    ),
    "ARTIFACT_INVALID": (
        "The `manifest.json` of the artifact can't be read.",
        "Compile the model again, or check the file's permissions.",
    ),
    "ARTIFACT_NEWER": (
        "The artifact was written by a later version of llmc.",
        "Update llmc: `pip install --upgrade llmc`.",
    ),
    "ARTIFACT_NOT_FOUND": (
        "There is no artifact at the given path.",
        "Compile a model first: `llmc compile MODEL -o DIR`.",
    ),
    "ARTIFACT_OLDER": (
        "The artifact was written by an earlier version of llmc, in a format that this version can't read.",
        "Compile the model again, or use the version that the message names.",
    ),
    "CHAT_INVALID": (
        "The chat template can't render the given messages.",
        "Give a list of messages with roles that the model knows, or use `--raw`.",
    ),
    "CHAT_TEMPLATE_INVALID": (
        "The chat template has a syntax error.",
        "Correct `chat_template.jinja`, or use `--raw`.",
    ),
    "CHAT_TEMPLATE_MISSING": (
        "The artifact has no chat template.",
        "Use `--raw`, or put the model's `chat_template.jinja` into the folder.",
    ),
    "GRAPH_FAILED": (
        "ONNX Runtime failed while it ran a graph of the artifact.",
        "Check the artifact on this machine with `llmc verify DIR`. If memory ran out, use shorter sequences.",
    ),
    "GRAPH_REFUSED": (
        "ONNX Runtime can't open a graph of the artifact.",
        "Install the release of ONNX Runtime that `manifest.json` names, or compile the model again.",
    ),
    "LAYERS_UNSUPPORTED": (
        "`llmc eval --per-layer` is used on an artifact of a target that can't return the outputs of layers.",
        "Measure without `--per-layer`.",
    ),
    "LAYERS_UNLIKE": (
        "`--per-layer` is given, but no layer of the artifact can be compared with the reference.",
        "Give the model that the artifact was compiled from, or leave out `--per-layer`.",
    ),
    "LOGITS_INVALID": (
        "No token can be sampled: every logit is NaN or excluded.",
        "Loosen penalties, bans and biases. Otherwise check the artifact with `llmc verify DIR`.",
    ),
    "LOGITS_NOT_FINITE": (
        "The artifact computes NaN on the measured text.",
        "Check the artifact with `llmc verify DIR`.",
    ),
    "NO_LAYER_BORDERS": (
        "`--per-layer` is given, but the graph has no layer with a single output.",
        "Leave out `--per-layer`.",
    ),
    "PLAN_FAILED": (
        "TensorRT failed while it ran a plan of the artifact.",
        "Check the artifact on this machine with `llmc verify DIR`.",
    ),
    "PLAN_REFUSED": (
        "TensorRT can't open a plan of the artifact.",
        "Build the plan again on this machine: `llmc finalize DIR`.",
    ),
    "PLAN_UNFIT": (
        "The artifact has no plan for this GPU and the installed version of TensorRT.",
        "Build a plan on this machine: `llmc finalize DIR`.",
    ),
    "REFERENCE_MISMATCH": (
        "The reference and the artifact have different vocabularies or tokenizers.",
        "Give the model that the artifact was compiled from, or another artifact of it.",
    ),
    "REFERENCE_MISSING": (
        "The artifact was compiled with `--no-verify`, so it contains no reference logits.",
        "Compare with the model: `llmc verify DIR MODEL`.",
    ),
    "RUNTIME_VERSION": (
        "The runtime that the artifact needs is missing or has another version.",
        "Install it with the command in the message.",
    ),
    "SERVER_PLAN_MISSING": (
        "The artifact has no plan that Triton Inference Server can load.",
        "Build one with TensorRT for data centres: `llmc finalize DIR`.",
    ),
    "TARGET_UNKNOWN": (
        "The artifact was compiled for a target that this version of llmc can't run.",
        "Update llmc, or compile the model for another target.",
    ),
    "TEXT_EMPTY": ("The text file is empty.", "Give a file with text."),
    "TEXT_INVALID": (
        "The text file is not UTF-8, or a line of a .jsonl file is invalid.",
        "Correct the file at the place that the message names.",
    ),
    "TEXT_NOT_FOUND": (
        "The text file can't be opened, or the installed Python lacks the built-in text.",
        "Give a text file, a .jsonl file, `docstrings` or `topics`.",
    ),
    "TEXT_TOO_SHORT": ("The text has fewer than 2 tokens.", "Give a longer text."),
    "TOKENIZER_INVALID": (
        "A file of the tokenizer can't be read.",
        "Download the file again, or compile the model again.",
    ),
    "TOKENIZER_MISSING": (
        "Text is given, but there is no tokenizer.",
        "Put the model's `tokenizer.json` into the folder, or give token ids.",
    ),
}

MACHINE: dict[str, tuple[str, str]] = {
    "CUDA_FAILED": (
        "A call of CUDA's driver failed.",
        "Load the artifact again. If it fails again, update NVIDIA's driver and check the GPU with `nvidia-smi`.",
    ),
    "CUDA_MEMORY": (
        "The GPU has too little free memory.",
        "Serve fewer sequences at once, end other programs on the GPU, or compile with a smaller `--max-seq-len`.",
    ),
    "CUDA_MISSING": (
        "The artifact needs an NVIDIA GPU and its driver, which this machine lacks.",
        "Use a machine with an NVIDIA GPU, or compile for another target.",
    ),
    "DISK_FULL": ("The disk is full.", "Free some space, or write to another disk."),
    "EXTRA_MISSING": (
        "A Python module that the command needs is not installed or can't be imported.",
        "Install the extra that the message names, such as `pip install 'llmc[compile]'`.",
    ),
    "FILE_UNUSABLE": (
        "A file can't be read or written, for example because of its permissions.",
        "Check the path and its permissions.",
    ),
    "ORT_WITHOUT_CUDA": (
        "The artifact needs ONNX Runtime with its CUDA provider, and the installed one lacks it or can't load it.",
        "Install it in place of the one for CPUs: `pip uninstall onnxruntime`, then `pip install 'llmc[gpu]'`.",
    ),
    "OUT_OF_MEMORY": (
        "The machine has too little memory.",
        "Give a smaller `--max-seq-len`, or use a larger machine. `llmc plan MODEL` shows what compiling needs.",
    ),
    "OUTPUT_UNWRITABLE": (
        "The page of `llmc inspect --html` can't be written.",
        "Choose another path.",
    ),
    "REFERENCE_DISK": (
        "The disk has too little space for the reference logits.",
        "Set `LLMC_CACHE` to a folder on another disk, or give a smaller `--max-tokens`.",
    ),
    "STDOUT_FAILED": (
        "The result can't be written to standard output, for example because the disk is full.",
        "Redirect the output to another place.",
    ),
    "TENSORRT_MISSING": (
        "The artifact needs TensorRT, which is not installed or can't be imported.",
        "Install the package that the message names, such as `pip install tensorrt-rtx`.",
    ),
    "TENSORRT_VERSION": (
        "The installed TensorRT is too old.",
        "Update it with the command that the message gives.",
    ),
    "TRT_BUILD_FAILED": (
        "TensorRT fails to build an engine from the graph.",
        "Compile the model for another target, or with another scheme.",
    ),
    "TRT_MEMORY": (
        "The machine has too little memory or disk space to build the TensorRT engine.",
        "Give a smaller `--max-seq-len`, quantize the weights, or use a larger machine.",
    ),
    "TRT_PARSE_REFUSED": (
        "TensorRT can't read the graph: it lacks the op that the message names.",
        "Compile the model for another target, or with another scheme.",
    ),
    "TRT_SM_UNSUPPORTED": (
        "The installed TensorRT can't build engines for the given GPU.",
        "Choose one of the compute capabilities that the message lists.",
    ),
    "TRT_UNSUPPORTED": (
        "The model or the scheme needs something that TensorRT engines can't do.",
        "Follow the message: usually a shorter `--max-seq-len`, another scheme, or another target.",
    ),
}
