"""What a model can be given as, and where its config, structure and weights come from.

A source is resolved without reading a weight: the config decides the structure, headers name the weights.
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
from ...ir.weights import Leaf, Weight, parameter
from .checkpoint import check_complete, match_checkpoint, open_safetensors
from .demo import demo_path
from .gguf import GgufFile
from .prequantized import Format, check_matched, find_format, read_weights
from .skeleton import parameters_on_meta

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_WANTED_FROM_HUB = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "tokenizer*"]


@dataclass(frozen=True)
class ModelSource:
    """A model that was found but not read.

    Attributes:
        name: what the user called it.
        config: its config, None for a plain module.
        build: its structure; parameters may be on meta.
        weights: the structure's parameters by name, lazily; those it doesn't name are the module's own.
        tokenizer: its tokenizer, or a `TOKENIZER_MISSING` error.
        files: what it was read from, which is its content; none for a module in memory.
    """

    name: str
    config: PreTrainedConfig | None
    build: Callable[[torch.dtype], nn.Module]
    weights: Callable[[nn.Module], Mapping[str, Weight]]
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    files: tuple[Path, ...] = ()


def find_source(model: str | Path | nn.Module, *, trust_remote_code: bool = False) -> ModelSource:
    """Find what `model` names: a module, `demo`, a GGUF file, a folder, or a model on the Hugging Face hub."""
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
                f"{path} is a pickle, which can run any code when it is read.",
                "Give a folder of safetensors.",
            )
        return _from_gguf(path, str(model))
    if str(model).count("/") == 1 and not str(model).startswith((".", "/", "~")) and path.suffix != ".gguf":
        return _from_folder(_download(str(model), trust_remote_code), str(model), trust_remote_code)
    raise LlmcError(
        "MODEL_NOT_FOUND",
        f"There is no model at {str(model)!r}.",
        "Give a folder with config.json and safetensors, a .gguf file, a hub id such as org/name, or demo.",
    )


def _from_module(module: nn.Module) -> ModelSource:
    config = getattr(module, "config", None)
    name = type(module).__name__

    def build(dtype: torch.dtype) -> nn.Module:
        """The module, or where its parameters have another dtype a copy of its structure; it stays what it was."""
        others = [p for p in module.parameters() if p.is_floating_point() and p.dtype != dtype]
        if not others:
            return module
        meta = {id(p): nn.Parameter(p.detach().to("meta", dtype), requires_grad=False) for p in others}
        return deepcopy(module, meta)

    def weights(model: nn.Module) -> Mapping[str, Weight]:
        return {name: parameter(p, name) for name, p in module.named_parameters(remove_duplicate=False)}

    def no_tokenizer() -> PreTrainedTokenizerBase:
        raise _no_tokenizer(name, "A module has none; compile from the folder it was loaded from.")

    return ModelSource(name, config, build, weights, no_tokenizer)


def _from_gguf(path: Path, name: str) -> ModelSource:
    file = GgufFile(path)
    config = file.config()

    def weights(model: Any) -> Mapping[str, Weight]:
        found = {key: Leaf(source) for key, source in file.hf_tensors(model).items()}
        check_complete(model, found, name)
        return found

    return ModelSource(name, config, lambda dtype: _skeleton(config, dtype, False), weights, file.tokenizer, (path,))


def _from_folder(folder: Path, name: str, trust_remote_code: bool) -> ModelSource:
    config, quantized = _read_config(folder, trust_remote_code)
    leaves = open_safetensors(folder)
    stored: Mapping[str, Weight] = read_weights(quantized, leaves) if quantized else leaves
    origin = f"{name} ({quantized.name})" if quantized else name

    def weights(model: Any) -> Mapping[str, Weight]:
        found = match_checkpoint(model, stored, origin)
        check_complete(model, found, origin)
        if quantized:
            check_matched(quantized, model, found)
        return found

    def tokenizer() -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        hint = "Put tokenizer.json and tokenizer_config.json beside its config.json."
        try:
            found = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:  # each kind of tokenizer has errors of its own
            raise _no_tokenizer(name, hint) from error
        # Some classes make an empty tokenizer where there are no files.
        if len(found) <= len(found.get_added_vocab()):
            raise _no_tokenizer(name, hint)
        return found

    files = (folder / "config.json", *sorted(folder.glob("*.safetensors")))
    build = lambda dtype: _skeleton(config, dtype, trust_remote_code)  # noqa: E731
    return ModelSource(name, config, build, weights, tokenizer, files)


def _no_tokenizer(name: str, hint: str) -> LlmcError:
    return LlmcError("TOKENIZER_MISSING", f"{name} has no tokenizer that can be read.", hint)


def _read_config(folder: Path, trust_remote_code: bool) -> tuple[PreTrainedConfig, Format | None]:
    """The config without what it says of quantized weights, which is the reader that comes with it."""
    from transformers import AutoConfig

    path = folder / "config.json"
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise LlmcError(
            "MODEL_NOT_FOUND", f"{folder} holds no config.json.", "Give the folder of a Hugging Face model."
        ) from None
    except ValueError as error:
        raise LlmcError("CONFIG_INVALID", f"{path} is not JSON: {error}.", "Fetch the file again.") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise LlmcError(
            "CONFIG_INVALID", f"{path} names no model_type.", "It must be the config of a Hugging Face model."
        )
    if "auto_map" in raw and not trust_remote_code and raw["model_type"] not in _known_types():
        raise LlmcError(
            "REMOTE_CODE",
            f"{folder} brings its own Python code for the model type {raw['model_type']!r}.",
            "If you have read and trust it, allow it by trust_remote_code.",
        )
    if raw["model_type"] not in _known_types() and "auto_map" not in raw:
        raise LlmcError(
            "MODEL_TYPE_UNKNOWN",
            f"{path} asks for the model type {raw['model_type']!r}, which this transformers does not know.",
            "Correct the config, or install the transformers release that brings it.",
        )
    quantization = raw.get("quantization_config")
    quantized = find_format(quantization) if quantization else None
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # validation differs by config class; all of it means that the file is wrong
        raise LlmcError(
            "CONFIG_INVALID", f"{path} is refused by its config class: {_first_line(error)}", "Correct it."
        ) from error
    if hasattr(config, "quantization_config"):  # or transformers would ask for the package that made it
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
    except Exception as error:  # nonsense in a config shows as whatever the model's code runs into
        if "Unrecognized configuration class" not in str(error):
            raise LlmcError(
                "CONFIG_INVALID", f"The config builds no model: {_first_line(error)}", "Correct it."
            ) from error
        raise LlmcError(
            "NOT_CAUSAL_LM",
            f"transformers has no causal language model for {type(config).__name__}.",
            "llmc compiles models of AutoModelForCausalLM.",
        ) from error


def _download(name: str, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [*_WANTED_FROM_HUB, "*.py"] if trust_remote_code else _WANTED_FROM_HUB
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # offline, gated, unknown: the hub client has a class for each, and all end here
        raise LlmcError(
            "MODEL_NOT_FOUND",
            f"{name!r} is no folder here and could not be fetched from the Hugging Face hub: {_first_line(error)}",
            "Check the name, the network and your access; or give a local folder.",
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
