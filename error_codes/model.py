"""Codes of plain `LlmcError` about models: finding, reading, capturing and compressing them."""

from __future__ import annotations

# Code -> when it occurs, what to do.
MODEL: dict[str, tuple[str, str]] = {
    "CHECKPOINT_QUANTIZED": (
        "The checkpoint is quantized in a format that llmc can't read.",
        "Use the original model, which `llmc compile` can quantize.",
    ),
    "DEMO_FETCH": (
        "The demo model can't be downloaded.",
        "Check the network and pip's settings, or name another model.",
    ),
    "GGUF_ARCH": (
        "transformers can't read GGUF files of this architecture.",
        "Use the checkpoint as safetensors.",
    ),
    "GGUF_CORRUPT": ("A GGUF file is cut off or damaged.", "Download or convert the file again."),
    "GGUF_ROPE": (
        "A GGUF file describes rotary embeddings in a form that llmc can't read.",
        "Use the checkpoint as safetensors.",
    ),
    "GGUF_SPLIT": (
        "A GGUF file is only one part of a model.",
        "Join the parts: `llama-gguf-split --merge FIRST_PART OUTPUT`.",
    ),
    "GGUF_TENSORS": (
        "The tensors of a GGUF file don't fit the model that it describes.",
        "Use the checkpoint as safetensors.",
    ),
    "GGUF_TOKENIZER": (
        "A GGUF file contains no tokenizer.",
        "Use a file with a tokenizer, or give token ids instead of text.",
    ),
    "GGUF_TYPE": (
        "A GGUF file stores a tensor in a format that llmc can't read.",
        "Use a file with one of the formats that the message lists.",
    ),
    "GGUF_VERSION": (
        "A GGUF file has an unknown version or byte order.",
        "Convert it to version 3, little-endian.",
    ),
    "MODEL_CONFIG_INVALID": (
        "The model's `config.json` is not JSON, names no model type, or describes no model that can be built.",
        "Correct the file, or download it again.",
    ),
    "MODEL_NOT_FOUND": (
        "There is no model at the given path, and none with this name can be downloaded.",
        "Give a folder, a GGUF file, a hub id such as `org/name`, or `demo`. Check the network and your access.",
    ),
    "MODEL_TYPE_UNKNOWN": (
        "The installed transformers does not know the model type in `config.json`.",
        "Install a release of transformers that knows it.",
    ),
    "NOT_CAUSAL_LM": (
        "The model is not a causal language model.",
        "Give a model that `AutoModelForCausalLM` can load.",
    ),
    "REMOTE_CODE": (
        "The model contains its own Python code, which llmc does not run without permission.",
        "Read the code. If you trust it, add `--trust-remote-code`.",
    ),
    "WEIGHTS_CORRUPT": ("A safetensors file is cut off or damaged.", "Download the file again."),
    "WEIGHTS_MISMATCH": (
        "A weight in the checkpoint has another shape than `config.json` describes.",
        "Use the `config.json` that belongs to the checkpoint.",
    ),
    "WEIGHTS_MISSING": (
        "The checkpoint lacks a weight or a file of weights.",
        "Download the checkpoint again, with all its files.",
    ),
    "WEIGHTS_PICKLE": (
        "The weights are a pickle, which can run any code when it is read.",
        "If you trust the file, convert it to safetensors with the command in the message.",
    ),
    "WEIGHTS_UNRECORDABLE": (
        "transformers converts the checkpoint by changing a tensor in place, which llmc can't record.",
        "Load the model with transformers and save it again with `save_pretrained`.",
    ),
}

COMPILING: dict[str, tuple[str, str]] = {
    "ATTENTION_UNKNOWN": (
        "The model passes its attention function an argument that llmc does not know.",
        "The model can't be compiled. Report it.",
    ),
    "CACHE_IMPOSSIBLE": (
        "A layer keeps a state other than keys and values from token to token.",
        "The model can't be compiled. `llmc inspect MODEL` shows the layer.",
    ),
    "CALIBRATION_TOO_SHORT": (
        "The calibration text has fewer than 2 tokens.",
        "Give a longer text with `--calib`.",
    ),
    "CAPTURE_DATA_DEPENDENT": (
        "The model's computation depends on the values of a tensor, for example by a branch.",
        "Rewrite that part of the model with masks or `torch.where`.",
    ),
    "CAPTURE_FAILED": (
        "`torch.export` can't trace the model.",
        "Check that the model exports with a dynamic batch size and sequence length.",
    ),
    "CAPTURE_SPECIALIZED": (
        "The model only works for a fixed batch size or sequence length.",
        "Rewrite that part of the model as operations on whole tensors.",
    ),
    "EXPERTS_UNKNOWN": (
        "The experts of a mixture-of-experts model compute something that the `moe` op can't express.",
        "The model can't be compiled. Report it.",
    ),
    "FORWARD_UNKNOWN": (
        "The `forward` of a given module takes other arguments than tokens and positions.",
        "Wrap the module in one whose `forward` takes `(tokens)` or `(tokens, positions)` and returns logits.",
    ),
    "LAYERS_NOT_A_CHAIN": (
        "`--drop-layers` is given, but the layers of the model don't follow one another.",
        "Compile without `--drop-layers`.",
    ),
    "MASK_UNKNOWN": (
        "The attention mask is neither causal, a sliding window nor chunked.",
        "The model can't be compiled. Report it.",
    ),
    "MAX_KL_UNREACHED": (
        "Even with 8 bits for every weight the divergence is above `--max-kl`.",
        "Give a larger `--max-kl`, or compile with `--int8`.",
    ),
    "MODEL_NOT_FINITE": (
        "The model computes NaN or infinite values, also without llmc.",
        "Check the weights of the checkpoint. If only calibration fails, use `--algo rtn`.",
    ),
    "ONNX_DTYPE": ("ONNX does not have a dtype that the model uses.", "Compile with `--dtype fp32`."),
    "OP_UNSUPPORTED": (
        "The model uses an operation that llmc can't write as ONNX.",
        "The model can't be compiled. Report it.",
    ),
    "PRUNE_NOTHING": (
        "`--prune` is given, but no weight of the model can be pruned.",
        "Compile without `--prune`.",
    ),
    "WEIGHTS_NOT_FINITE": (
        "A weight holds NaN or infinite values, so it can't be quantized.",
        "Fix the checkpoint.",
    ),
}
