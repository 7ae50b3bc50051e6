"""A GGUF checkpoint, read one tensor at a time and seen as the transformers model that it holds."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers import __version__ as transformers_version
from transformers import modeling_gguf_pytorch_utils as hf_gguf

from ...errors import LlmcError
from .gguf_blocks import value_dtype, values_of
from .gguf_header import MAGIC, STRING, GgufTensorInfo, corrupt, read_header
from .gguf_rope import ROPE_FREQS, restore_rope_scaling

_TOKENS = "tokenizer.ggml.tokens"
_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


@dataclass(frozen=True)
class GgufSource:
    """The value of one model parameter, made from the file each time that it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    key: str
    nbytes: int
    _read: Callable[[], torch.Tensor] = field(repr=False, compare=False)

    def __str__(self) -> str:
        return self.key

    def read(self) -> torch.Tensor:
        """The parameter in transformers' layout."""
        return self._read()


class GgufFile:
    """A GGUF file whose header has been read and checked; tensors stay on disk until asked for.

    Args:
        path: the file.

    Raises:
        LlmcError: as `read_header` says.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.header = read_header(self.path)

    @property
    def metadata(self) -> dict[str, Any]:
        """Every metadata entry as a Python value."""
        return self.header.metadata

    @property
    def tensors(self) -> dict[str, GgufTensorInfo]:
        """Every tensor by its GGUF name."""
        return self.header.tensors

    def read(self, name: str) -> torch.Tensor:
        """The tensor called ``name``: F32, F16 and BF16 as they are stored, any other type as float32."""
        info = self.tensors[name]
        raw = np.fromfile(self.path, np.uint8, count=info.nbytes, offset=info.offset)
        if raw.size != info.nbytes:
            raise corrupt(self.path, f"tensor {name} ends {info.nbytes - raw.size} bytes early: the file has changed")
        return values_of(raw, info.type).reshape(info.shape)

    def config(self) -> PreTrainedConfig:
        """The model's configuration, as transformers reads it from the metadata.

        Raises:
            LlmcError: ``GGUF_ARCH`` for an architecture that transformers has no GGUF table for, ``GGUF_ROPE``
                for a rope scaling that its tables would drop.
        """
        arch = self.header.architecture
        try:
            values = self._table_config()
            config = CONFIG_MAPPING[values.pop("model_type")].from_dict(values)
        except (KeyError, ValueError, NotImplementedError) as error:
            raise _unknown_architecture(self.path, arch, error) from error
        return restore_rope_scaling(self.path, config, self.metadata, self._rope_divisors())

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that the file carries, with its special tokens and chat template."""
        tokens = self.metadata.get(_TOKENS)
        if not tokens:
            raise LlmcError("GGUF_TOKENIZER", f"{self.path} carries no tokenizer.", "Name one of its own.")
        special: dict[str, str | None] = {}
        for role, key in _SPECIAL_TOKENS.items():
            index = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
            if index is not None and not 0 <= index < len(tokens):
                raise corrupt(self.path, f"the {role} is {index}, and the vocabulary has {len(tokens)} entries")
            special[role] = None if index is None else tokens[index]
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(self.path.parent, gguf_file=self.path.name)
        except (KeyError, ValueError, NotImplementedError) as error:
            raise _unknown_architecture(self.path, self.header.architecture, error) from error
        # transformers 5.17 makes the first token of a text its last as well, and knows no padding: set them here.
        for role, token in special.items():
            setattr(tokenizer, role, token)
        return tokenizer

    def hf_tensors(self, model: PreTrainedModel) -> dict[str, GgufSource]:
        """For each parameter of ``model`` (which may be on meta), where its value comes from.

        A tied parameter has its partner's source. The family's own layout (rope permutation, norms stored plus
        one, merged experts) is undone when a source is read.

        Raises:
            LlmcError: ``GGUF_ARCH`` as in `config`; ``GGUF_TENSORS`` if a parameter has no tensor, a tensor no
                parameter, or their sizes differ.
        """
        arch = self.header.architecture
        processor = hf_gguf.TENSOR_PROCESSORS.get(arch, hf_gguf.TensorProcessor)(config=model.config.to_dict())
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        try:
            names = hf_gguf.get_gguf_hf_weights_map(_NamesOf.model(model), processor, model_type=arch)
        except NotImplementedError as error:
            raise _unknown_architecture(self.path, arch, error) from error

        parts: dict[str, list[GgufTensorInfo]] = {}
        for info in self.tensors.values():
            # Merged experts are parameters without the suffix that their tensors have.
            target = names.get(info.name) or names.get(info.name.removesuffix(".weight"))
            if target in shapes:
                parts.setdefault(target, []).append(info)
            elif info.name != ROPE_FREQS:
                raise self._mismatch(f"tensor {info.name} has no place in {type(model).__name__}")
        sources = {
            target: self._source(target, infos, shapes[target], processor, names) for target, infos in parts.items()
        }
        for tied, partner in model.all_tied_weights_keys.items():
            if tied not in sources and partner in sources:
                sources[tied] = sources[partner]
        for name, _ in model.named_parameters():
            if name not in sources:
                raise self._mismatch(f"no tensor holds parameter {name} of {type(model).__name__}")
        return sources

    def _source(
        self,
        target: str,
        infos: list[GgufTensorInfo],
        shape: tuple[int, ...],
        processor: hf_gguf.TensorProcessor,
        names: dict[str, str],
    ) -> GgufSource:
        stored = sum(int(np.prod(info.shape, dtype=np.int64)) for info in infos)
        labels = "+".join(info.name for info in infos)
        if stored != int(np.prod(shape, dtype=np.int64)):
            raise self._mismatch(f"{labels} holds {stored} values, and parameter {target} has the shape {list(shape)}")
        # A family may offset a vector (a norm), which half precision would round; matrices are only moved about.
        kinds = {value_dtype(info.type) for info in infos if len(info.shape) > 1}
        dtype = kinds.pop() if len(kinds) == 1 else torch.float32

        def read() -> torch.Tensor:
            parsed: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
            for info in infos:
                done = processor.process(
                    weights=self.read(info.name).float().numpy(),
                    name=info.name,
                    tensor_key_mapping=names,
                    parsed_parameters=parsed,
                )
                # No name means that the processor has put the value, or its share of it, in place itself.
                if done.name is not None:
                    parsed["tensors"][target] = torch.from_numpy(np.ascontiguousarray(done.weights))
            value = parsed["tensors"][target]
            if tuple(value.shape) != shape:
                raise self._mismatch(f"{labels} becomes {list(value.shape)}, and {target} has the shape {list(shape)}")
            return value.to(dtype)

        return GgufSource(shape, dtype, f"{self.path.name}:{labels}", sum(info.nbytes for info in infos), read)

    def _table_config(self) -> dict[str, Any]:
        """What transformers' own tables make of the metadata.

        They are reached by a function that wants a file and parses each entry of its vocabulary at length, of which
        it then takes the number: it gets a file whose vocabulary is one string of that length.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            self._write_stand_in(path)
            values: dict[str, Any] = hf_gguf.load_gguf_checkpoint(path)["config"]
        values.pop("_model_name_or_path", None)
        return values

    def _write_stand_in(self, path: Path) -> None:
        """Write a GGUF file with this one's metadata and names of tensors, all empty."""
        entries = []
        with self.path.open("rb") as file:
            for key, (start, end) in self.header.spans.items():
                if not (key.startswith("tokenizer.") and isinstance(self.metadata[key], list)):
                    file.seek(start)
                    entries.append(file.read(end - start))
        if tokens := self.metadata.get(_TOKENS):
            entries.append(_string(_TOKENS) + struct.pack("<I", STRING) + _string(" " * len(tokens)))
        empty = struct.pack("<IQIQ", 1, 0, GGMLQuantizationType.F32, 0)
        with path.open("wb") as out:
            out.write(struct.pack("<4sIQQ", MAGIC, self.header.version, len(self.tensors), len(entries)))
            out.writelines(entries)
            out.writelines(_string(name) + empty for name in self.tensors)

    def _rope_divisors(self) -> torch.Tensor | None:
        return self.read(ROPE_FREQS) if ROPE_FREQS in self.tensors else None

    def _mismatch(self, what: str) -> LlmcError:
        return LlmcError("GGUF_TENSORS", f"{self.path}: {what}.", "Use the checkpoint in its safetensors form.")


@dataclass
class _NamesOf:
    """As much of a module as transformers' name table looks at.

    Given the model itself, the table would be built anew for each of its submodules: seconds for 30 layers. Only
    the whole model's names and those inside its base model occur in it.
    """

    config: PreTrainedConfig
    names: list[str]
    inner: tuple[tuple[str, _NamesOf], ...] = ()

    @classmethod
    def model(cls, model: PreTrainedModel) -> _NamesOf:
        names, prefix = list(model.state_dict()), model.base_model_prefix
        inside = [name.removeprefix(f"{prefix}.") for name in names if name.startswith(f"{prefix}.")]
        return cls(model.config, names, ((prefix, cls(model.config, inside)),) if inside else ())

    def state_dict(self) -> list[str]:
        return self.names

    def named_children(self) -> Iterable[tuple[str, _NamesOf]]:
        return self.inner


def _string(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _unknown_architecture(path: Path, arch: str, error: Exception) -> LlmcError:
    return LlmcError(
        "GGUF_ARCH",
        f"{path}: transformers {transformers_version} can't read a GGUF of architecture {arch} ({error}).",
        "Use the checkpoint in its safetensors form.",
    )
