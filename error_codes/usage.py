"""Codes of `UsageError`: an option or argument has an invalid name or value."""

from __future__ import annotations

# Code -> when it occurs, what to do.
USAGE: dict[str, tuple[str, str]] = {
    "BATCH_INVALID": (
        "The arrays of an engine's batch don't fit together.",
        "Build the batch with `Batch.of`.",
    ),
    "BENCH_TOO_LONG": (
        "`llmc bench` would measure more tokens than the artifact serves.",
        "Give smaller values for `-p` and `-n`, or compile with a larger `--max-seq-len`.",
    ),
    "CONFIG_INVALID": (
        "An option of `llmc compile` or `llmc plan` has an unknown value, or two options contradict each other.",
        "Use one of the values that the message lists.",
    ),
    "DTYPE_SLOW": (
        "The dtype has no fast kernels on the target.",
        "Give one of the dtypes that the message lists, or choose another `--target`.",
    ),
    "DTYPE_UNKNOWN": ("llmc can't compute in this dtype.", "Use `fp32`, `fp16` or `bf16`."),
    "ENGINE_CLOSED": ("An engine is called after its `close`.", "Load the artifact again."),
    "FUEL_INVALID": (
        "The environment variable `LLMC_FUEL` is not a whole number.",
        "Set it to 0 or more, or unset it.",
    ),
    "FUEL_TOO_LOW": (
        "`LLMC_FUEL` allows fewer rewrites than a stage of the compilation needs.",
        "Set it higher. `llmc inspect` shows how many rewrites each pass does.",
    ),
    "FINALIZE_UNSUPPORTED": (
        "The artifact's target needs no step for one machine.",
        "Run the artifact: `llmc run DIR`.",
    ),
    "GROUP_SIZE_INDIVISIBLE": (
        "The group size does not divide the number of inputs of a weight.",
        "Give a `--group-size` that the message lists, or leave the weight out with `--ignore`.",
    ),
    "LAYERS_TOO_FEW": (
        "`--drop-layers` would remove every layer of the model.",
        "Give a smaller number.",
    ),
    "MAX_SEQ_LEN_INVALID": ("`max_seq_len` is less than 1.", "Give 1 or more."),
    "OPTION_UNKNOWN": (
        "An option does not exist, or belongs to another target than the chosen one.",
        "Leave it out, or choose its target with `--target`.",
    ),
    "OUTPUT_EXISTS": (
        "The output folder holds files that are not an artifact of llmc.",
        "Choose another folder, or remove that one first.",
    ),
    "OUTPUT_INVALID": (
        "The output folder can't be created, written or replaced.",
        "Choose another folder, or create its parent folder.",
    ),
    "PROFILE_TOO_LONG": (
        "`llmc bench --profile` runs more kernels than ONNX Runtime's profiler can record.",
        "Give smaller values for `-p` and `-n`.",
    ),
    "PROFILE_UNSUPPORTED": (
        "The engine of the artifact can't measure time by kernel.",
        "Leave out `--profile`.",
    ),
    "PROMPT_EMPTY": ("A prompt has no tokens.", "Give a prompt with at least one token."),
    "PROMPT_INVALID": (
        "A prompt is neither text nor a list of token ids that the model knows.",
        "Give text, or token ids from the model's own tokenizer.",
    ),
    "PROMPT_NOT_UTF8": (
        "A prompt contains bytes that are not UTF-8.",
        "Convert the text to UTF-8, for example with `iconv -t UTF-8`.",
    ),
    "PROMPT_TOO_LONG": (
        "A prompt is as long as the longest sequence that the artifact serves, or longer.",
        "Shorten the prompt, or compile with a larger `--max-seq-len`.",
    ),
    "RECIPE_INVALID": (
        "The file given by `--config` can't be read, or contains an unknown key or value.",
        "Correct the file at the place that the message names.",
    ),
    "RECIPE_UNUSED": (
        "A pattern in the recipe or in `--ignore` matches no weight that can be quantized.",
        "Correct the pattern. `llmc inspect MODEL` shows the names of all weights.",
    ),
    "ROLLBACK_TOO_FAR": (
        "An engine can't go back to a position because later tokens have overwritten keys and values that it needs.",
        "Start again from position 0, or compile with a larger `--spec-tokens` or with `--kv-cache static`.",
    ),
    "SAMPLING_INVALID": (
        "A sampling parameter, such as `--temperature` or `--top-p`, is out of range.",
        "Give a value within the range that the message states.",
    ),
    "SCHEME_INVALID": (
        "The quantization scheme, its algorithm or its group size is unknown, or they don't fit together.",
        "Use one of the combinations that the message lists.",
    ),
    "SEQUENCE_TOO_LONG": (
        "A sequence would be longer than the longest one that the engine supports.",
        "Shorten the sequence, or compile with a larger `--max-seq-len`.",
    ),
    "SLOT_CLOSED": (
        "An engine is called with a slot that is not open.",
        "Call `open_slots` with a larger number first.",
    ),
    "STAGE_UNREACHED": (
        "No pass of the pipeline reaches the requested stage.",
        "Use one of the stages that the message lists.",
    ),
    "TOKEN_UNKNOWN": (
        "An engine is called with a token id outside the model's vocabulary.",
        "Use the tokenizer in the artifact.",
    ),
    "WINDOW_INVALID": (
        "`--window` is longer than the artifact serves, or `--stride` is too large for the window.",
        "Give values within the ranges that the message states.",
    ),
    "WORKLOAD_INVALID": (
        "A workload for `llmc bench` has no request, or a line that is not one.",
        'Give a JSON object per line: `{"prompt_tokens": 20, "new_tokens": 30, "at_s": 0.5}`.',
    ),
}
