"""Find a model, its config, structure, lazy weights and tokenizer.

No weight is read: the config defines the structure, and file headers name the weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import LlmcError
from ...ir.weights import Weight, parameter
from .checkpoint import check_complete, match_checkpoint, open_safetensors
from .demo import demo_path
from .gguf import GgufFile
from .prequantized import Format, check_matched, find_format, read_weights
from .skeleton import parameters_on_meta

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "tokenizer*"]


@dataclass(frozen=True)
class ModelSource:
    """A model whose structure is known, but whose weights are not read yet.

    Attributes:
        name: the name or path that the user passed, or the module's class name.
        config: the model's config; None for a plain module.
        build: returns the structure with parameters of the given dtype, possibly on the meta device.
        weights: returns lazy weights of the structure's parameters by name. A parameter that is missing here has its
            value in the module itself.
        tokenizer: returns the tokenizer, or raises `TOKENIZER_MISSING`.
        files: the config and weight files, which define the model's content; empty for a module in memory.
    """

    name: str
    config: PreTrainedConfig | None
    build: Callable[[torch.dtype], nn.Module]
    weights: Callable[[nn.Module], Mapping[str, Weight]]
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    files: tuple[Path, ...] = ()


def find_source(model: str | Path | nn.Module, *, trust_remote_code: bool = False) -> ModelSource:
    """Find a model by module, name or path.

    The name can be `demo`, a GGUF file, a folder, or the id of a model on the Hugging Face hub.

    Args:
        model: the module, path or name.
        trust_remote_code: allow Python code that comes with the model to run.
    """
    if isinstance(model, nn.Module):
        return _from_module(model)
    if str(model) == "demo":
        return _from_gguf(demo_path(), "demo")
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(path, str(model), trust_remote_code)
    if path.is_file():
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            raise LlmcError(
                "WEIGHTS_PICKLE",
                f"{path} is a pickle file, which can run arbitrary code when loaded.",
                "Pass a folder with safetensors files instead.",
            )
        return _from_gguf(path, str(model))
    if str(model).count("/") == 1 and not str(model).startswith((".", "/", "~")) and path.suffix != ".gguf":
        return _from_folder(_download(str(model), trust_remote_code), str(model), trust_remote_code)
    raise LlmcError(
        "MODEL_NOT_FOUND",
        f"There is no model at {str(model)!r}.",
        "Pass a folder with config.json and safetensors files, a .gguf file, a hub id such as org/name, or demo.",
    )


def _from_module(module: nn.Module) -> ModelSource:
    config = getattr(module, "config", None)
    name = type(module).__name__

    def build(dtype: torch.dtype) -> nn.Module:
        """Return the module, or a copy with meta parameters if the dtype must change."""
        to_cast = [p for p in module.parameters() if p.is_floating_point() and p.dtype != dtype]
        if not to_cast:
            return module
        memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta", dtype), requires_grad=False) for p in to_cast}
        follow = _buffers_in(module, dtype)
        memo |= {id(b): b.to(dtype) for name, b in module.named_buffers() if name in follow}
        return deepcopy(module, memo)

    def weights(model: nn.Module) -> Mapping[str, Weight]:
        return {name: parameter(p, name) for name, p in module.named_parameters(remove_duplicate=False)}

    def no_tokenizer() -> PreTrainedTokenizerBase:
        raise _no_tokenizer(name, "Compile from the folder the module was loaded from; a module has no tokenizer.")

    return ModelSource(name, config, build, weights, no_tokenizer)


def _buffers_in(module: nn.Module, dtype: torch.dtype) -> set[str]:
    """Return the buffers that have the dtype if the model is loaded in it, such as tables of positions."""
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        return set()
    with parameters_on_meta():
        loaded = type(module)._from_config(deepcopy(module.config), dtype=dtype)
    return {name for name, buffer in loaded.named_buffers() if buffer.dtype == dtype}


def _from_gguf(path: Path, name: str) -> ModelSource:
    file = GgufFile(path)
    config = file.config()

    def weights(model: Any) -> Mapping[str, Weight]:
        matched = file.hf_weights(model)
        check_complete(model, matched, name)
        return matched

    return ModelSource(name, config, lambda dtype: _skeleton(config, dtype, False), weights, file.tokenizer, (path,))


def _from_folder(folder: Path, name: str, trust_remote_code: bool) -> ModelSource:
    config, quantized = _read_config(folder, trust_remote_code)
    leaves = open_safetensors(folder)
    stored: Mapping[str, Weight] = read_weights(quantized, leaves) if quantized else leaves
    origin = f"{name} ({quantized.name})" if quantized else name

    def weights(model: Any) -> Mapping[str, Weight]:
        matched = match_checkpoint(model, stored, origin)
        check_complete(model, matched, origin)
        if quantized:
            check_matched(quantized, model, matched)
        return matched

    def tokenizer() -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        hint = "Put tokenizer.json and tokenizer_config.json in the folder of its config.json."
        try:
            loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:  # each tokenizer class raises its own errors
            raise _no_tokenizer(name, hint) from error
        # Without files, some classes return an empty tokenizer instead of an error.
        if len(loaded) <= len(loaded.get_added_vocab()):
            raise _no_tokenizer(name, hint)
        return loaded

    files = (folder / "config.json", *sorted(folder.glob("*.safetensors")))
    build = lambda dtype: _skeleton(config, dtype, trust_remote_code)  # noqa: E731
    return ModelSource(name, config, build, weights, tokenizer, files)


def _no_tokenizer(name: str, hint: str) -> LlmcError:
    return LlmcError("TOKENIZER_MISSING", f"{name} has no readable tokenizer.", hint)


def _read_config(folder: Path, trust_remote_code: bool) -> tuple[PreTrainedConfig, Format | None]:
    """Read a folder's config, and choose the reader of its quantized weights, if any.

    The returned config has no `quantization_config`.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise LlmcError(
            "MODEL_NOT_FOUND", f"{folder} contains no config.json.", "Pass the folder of a Hugging Face model."
        ) from None
    except ValueError as error:
        raise LlmcError("MODEL_CONFIG_INVALID", f"{path} is not JSON: {error}.", "Download the file again.") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise LlmcError(
            "MODEL_CONFIG_INVALID", f"{path} has no model_type.", "Pass the folder of a Hugging Face model."
        )
    if "auto_map" in raw and not trust_remote_code and raw["model_type"] not in _known_types():
        raise LlmcError(
            "REMOTE_CODE",
            f"{folder} needs its own Python code for the model type {raw['model_type']!r}.",
            "Read that code; if you trust it, set trust_remote_code (--trust-remote-code).",
        )
    if raw["model_type"] not in _known_types() and "auto_map" not in raw:
        raise LlmcError(
            "MODEL_TYPE_UNKNOWN",
            f"{path} has the model type {raw['model_type']!r}, which the installed transformers does not support.",
            "Correct the config, or install a transformers release that supports this model type.",
        )
    quantization = raw.get("quantization_config")
    quantized = find_format(quantization) if quantization else None
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # each config class validates in its own way; any error means that the file is wrong
        raise LlmcError(
            "MODEL_CONFIG_INVALID",
            f"The config class of {path} rejects it: {_first_line(error)}",
            "Correct the config.",
        ) from error
    if hasattr(config, "quantization_config"):  # transformers would require the package that quantized the model
        del config.quantization_config
    return config, quantized


def _known_types() -> Mapping[str, Any]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return CONFIG_MAPPING_NAMES


def _skeleton(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        with parameters_on_meta():
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    except Exception as error:  # a wrong config can cause any error in the model's code
        if "Unrecognized configuration class" not in str(error):
            raise LlmcError(
                "MODEL_CONFIG_INVALID",
                f"No model can be built from the config: {_first_line(error)}",
                "Correct the config.",
            ) from error
        raise LlmcError(
            "NOT_CAUSAL_LM",
            f"transformers has no causal language model for {type(config).__name__}.",
            "Pass a model that AutoModelForCausalLM can load.",
        ) from error


def _download(name: str, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*_HUB_FILES, "*.py"] if trust_remote_code else _HUB_FILES
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client has a class for each cause: offline, gated, unknown id
        raise LlmcError(
            "MODEL_NOT_FOUND",
            f"{name!r} is not a local folder, and its download from the Hugging Face hub failed: {_first_line(error)}",
            "Check the name, the network and your access rights, or pass a local folder.",
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
