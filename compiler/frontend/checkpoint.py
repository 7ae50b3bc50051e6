"""Lazy weights of a folder of safetensors files, by the model's names.

A checkpoint may name and split tensors differently from the model that transformers builds today: for example, one
tensor per expert in the file and one merged tensor for all experts in the model. transformers describes the
difference by renamings and converters. Here they run on recording tensors, so that their work becomes a weight
expression and no weight is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import LlmcError
from ...ir.weights import Leaf, SafetensorsSource, Weight, record, recorded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def open_safetensors(folder: Path) -> dict[str, Leaf]:
    """Map each tensor name in the folder's safetensors files to its lazy weight.

    Only headers are read.
    """
    leaves: dict[str, Leaf] = {}
    for path in _files(folder):
        leaves.update(_read_header(path))
    return leaves


def _files(folder: Path) -> list[Path]:
    if (folder / _WHOLE).is_file():  # transformers prefers it over shards, too
        return [folder / _WHOLE]
    index = folder / _INDEX
    if index.exists():
        try:
            shards = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LlmcError(
                "WEIGHTS_CORRUPT", f"{index} is not a safetensors index: {error}.", "Download the file again."
            ) from None
        for shard in shards:
            if not shard.exists():
                raise LlmcError(
                    "WEIGHTS_MISSING",
                    f"{index} lists {shard.name}, which does not exist.",
                    "Download the missing shard.",
                )
        return shards
    if files := sorted(folder.glob("*.safetensors")):
        return files
    if pickles := sorted(path for pattern in _PICKLES for path in folder.glob(pattern)):
        raise LlmcError(
            "WEIGHTS_PICKLE",
            f"{pickles[0]} is a pickle file, which can run arbitrary code when loaded; llmc reads safetensors only.",
            'If you trust it, convert it once: python -c "from transformers import AutoModelForCausalLM as M; '
            f'M.from_pretrained({str(folder)!r}).save_pretrained({str(folder) + "-safetensors"!r})"',
        )
    raise LlmcError(
        "WEIGHTS_MISSING",
        f"{folder} contains no safetensors file.",
        "Pass a folder that contains the model's weights.",
    )


def _read_header(path: Path) -> dict[str, Leaf]:
    """Read tensor names, shapes and offsets from a file's header.

    A truncated file is refused.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if not 2 <= length <= size - 8:
                raise ValueError("its header is truncated")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        leaves = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
            if end - start != torch.Size(shape).numel() * dtype.itemsize or 8 + length + end > size:
                raise ValueError(f"the tensor {name} is truncated")
            leaves[name] = Leaf(SafetensorsSource(path, name, shape, dtype, end - start))
        return leaves
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LlmcError("WEIGHTS_CORRUPT", f"{path} can't be read: {error}.", "Download the file again.") from None


def match_checkpoint(
    model: PreTrainedModel, leaves: Mapping[str, Weight], origin: str = "The checkpoint"
) -> dict[str, Weight]:
    """Map the model's parameter and buffer names to the checkpoint's weights.

    Tensors that the model does not use are left out.

    Args:
        model: the model; only its names and its class's conversions are used.
        leaves: the checkpoint's weights by their names in the files.
        origin: name of the checkpoint in error messages.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    owner = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    prefix = getattr(model, "base_model_prefix", None)

    found: dict[str, Weight] = {}
    groups: dict[str, Any] = {}
    for key in sorted(leaves, key=_natural):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        if name not in state:
            continue  # unused by this model: another head, or a buffer of an older transformers version
        if pattern is None:
            found[name] = leaves[key]
        else:
            group = groups.setdefault(name, deepcopy(owner[pattern]))
            group.add_tensor(name, key, pattern, record(leaves[key]))
    for name, group in groups.items():
        try:
            converted = group.convert(name, model=model, config=model.config)
        except (ValueError, RuntimeError) as error:
            raise LlmcError(
                "WEIGHTS_MISMATCH",
                f"{origin}'s tensors can't be merged into {name}: {str(error).splitlines()[0]}.",
                "Check that the checkpoint and config.json belong to the same model and that no tensor is missing.",
            ) from error
        for target, value in converted.items():
            found[target] = recorded(value[0] if isinstance(value, list) else value)
    return found


def _natural(key: str) -> list[Any]:
    """Sort key for tensor names with numbers.

    It puts `experts.2` before `experts.10`, the order in which transformers collects them.
    """
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.findall(r"\d+|[^\d.]+", key)]


def check_complete(model: nn.Module, weights: Mapping[str, Weight], origin: str) -> None:
    """Refuse a checkpoint with a missing parameter or a tensor of the wrong shape."""
    hint = "Check that the checkpoint and config.json belong to the same model."
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    for names in tied.values():
        if not any(name in weights for name in names):
            raise LlmcError("WEIGHTS_MISSING", f"{origin} has no weight {names[0]}.", hint)
    for name, value in model.state_dict().items():
        if name in weights and weights[name].shape != tuple(value.shape):
            shapes = f"{weights[name].shape}, but the config requires {tuple(value.shape)}"
            raise LlmcError("WEIGHTS_MISMATCH", f"{origin} stores {name} with shape {shapes}.", hint)
