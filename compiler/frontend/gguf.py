"""A GGUF checkpoint as the transformers model that it holds, read one tensor at a time."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers import __version__ as transformers_version
from transformers import modeling_gguf_pytorch_utils as hf_gguf

from ...errors import LlmcError
from ...ir.weights import Weight
from .gguf_blocks import value_dtype, values_of
from .gguf_header import MAGIC, STRING, GgufTensorInfo, corrupt, read_header
from .gguf_rope import ROPE_FREQS, restore_rope_scaling
from .gguf_weights import GgufSource, with_stored_codes

_TOKENS = "tokenizer.ggml.tokens"
_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class GgufFile:
    """A GGUF file whose header has been read and checked. Tensors stay on disk until they are read.

    Args:
        path: the file.

    Raises:
        LlmcError: the errors of `read_header`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.header = read_header(self.path)

    @property
    def metadata(self) -> dict[str, Any]:
        """All metadata entries as Python values."""
        return self.header.metadata

    @property
    def tensors(self) -> dict[str, GgufTensorInfo]:
        """All tensors by their GGUF names."""
        return self.header.tensors

    def read(self, name: str) -> torch.Tensor:
        """Read the tensor ``name``: in its own dtype if it is F32, F16 or BF16, else dequantized to float32."""
        info = self.tensors[name]
        return values_of(self._read_bytes(info), info.type).reshape(info.shape)

    def _read_bytes(self, info: GgufTensorInfo) -> np.ndarray:
        raw = np.fromfile(self.path, np.uint8, count=info.nbytes, offset=info.offset)
        if raw.size != info.nbytes:
            raise corrupt(
                self.path, f"tensor {info.name} ends {info.nbytes - raw.size} bytes early: the file has changed"
            )
        return raw

    def config(self) -> PreTrainedConfig:
        """Return the model's config, as transformers reads it from the metadata.

        Raises:
            LlmcError: ``GGUF_ARCH`` if transformers has no GGUF table for the architecture, ``GGUF_ROPE`` if its
                tables would drop the rope scaling.
        """
        arch = self.header.architecture
        try:
            values = self._table_config()
            config = CONFIG_MAPPING[values.pop("model_type")].from_dict(values)
        except (KeyError, ValueError, NotImplementedError) as error:
            raise _unknown_architecture(self.path, arch, error) from error
        return restore_rope_scaling(self.path, config, self.metadata, self._rope_divisors())

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer of the file, with its special tokens and chat template.

        Raises:
            LlmcError: ``GGUF_TOKENIZER`` if the file has none, ``GGUF_CORRUPT`` if a special token is not in its
                vocabulary, ``GGUF_ARCH`` if transformers can't read it.
        """
        tokens = self.metadata.get(_TOKENS)
        if not tokens:
            raise LlmcError("GGUF_TOKENIZER", f"{self.path} has no tokenizer.", "Use a GGUF file that has one.")
        special: dict[str, str | None] = {}
        for role, key in _SPECIAL_TOKENS.items():
            index = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
            if index is not None and not 0 <= index < len(tokens):
                raise corrupt(self.path, f"{role} is {index}, but the vocabulary has {len(tokens)} entries")
            special[role] = None if index is None else tokens[index]
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(self.path.parent, gguf_file=self.path.name)
        except (KeyError, ValueError, NotImplementedError) as error:
            raise _unknown_architecture(self.path, self.header.architecture, error) from error
        # transformers 5.17 sets eos_token to the token of bos, and sets no pad_token.
        for role, token in special.items():
            setattr(tokenizer, role, token)
        return tokenizer

    def hf_tensors(self, model: PreTrainedModel) -> dict[str, GgufSource]:
        """Return the source of each parameter's value. ``model`` may be on the meta device.

        A tied parameter has the same source as its partner. Reading a source undoes the layout of the model's
        family: permuted heads, norms stored plus one, separate expert matrices.

        Raises:
            LlmcError: ``GGUF_ARCH`` as in `config`; ``GGUF_TENSORS`` if a parameter has no tensor, a tensor has no
                parameter, or their sizes differ.
        """
        arch, processor = self.header.architecture, self._processor(model)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        try:
            names = hf_gguf.get_gguf_hf_weights_map(_NamesOf.model(model), processor, model_type=arch)
        except NotImplementedError as error:
            raise _unknown_architecture(self.path, arch, error) from error

        parts: dict[str, list[GgufTensorInfo]] = {}
        for info in self.tensors.values():
            # The parameters of merged experts lack the suffix ".weight" that their tensors have.
            target = names.get(info.name) or names.get(info.name.removesuffix(".weight"))
            if target in shapes:
                parts.setdefault(target, []).append(info)
            elif info.name != ROPE_FREQS:
                raise self._mismatch(f"{type(model).__name__} has no parameter for tensor {info.name}")
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

    def hf_weights(self, model: PreTrainedModel) -> dict[str, Weight]:
        """Return each parameter of ``model`` as a lazy weight, with its Q8_0 or Q4_0 codes where they are kept.

        Raises:
            LlmcError: the errors of `hf_tensors`.
        """
        return with_stored_codes(self.hf_tensors(model), self._processor(model), self._read_bytes)

    def _processor(self, model: PreTrainedModel) -> hf_gguf.TensorProcessor:
        """Return transformers' object that undoes the layout of the model's family."""
        return hf_gguf.TENSOR_PROCESSORS.get(self.header.architecture, hf_gguf.TensorProcessor)(
            config=model.config.to_dict()
        )

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
            raise self._mismatch(f"{labels} holds {stored} values, but parameter {target} has the shape {list(shape)}")
        # Some families store a norm plus one. Half precision would round the difference, so vectors become float32.
        # The values of matrices are only moved.
        dtypes = {value_dtype(info.type) for info in infos if len(info.shape) > 1}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32

        def read() -> torch.Tensor:
            parsed: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
            for info in infos:
                done = processor.process(
                    weights=self.read(info.name).float().numpy(),
                    name=info.name,
                    tensor_key_mapping=names,
                    parsed_parameters=parsed,
                )
                # Without a name, the processor has already put the value, or a part of it, into `parsed`.
                if done.name is not None:
                    parsed["tensors"][target] = torch.from_numpy(np.ascontiguousarray(done.weights))
            value = parsed["tensors"][target]
            if tuple(value.shape) != shape:
                raise self._mismatch(f"{labels} has the shape {list(value.shape)}, but {target} has {list(shape)}")
            return value.to(dtype)

        nbytes = sum(info.nbytes for info in infos)
        return GgufSource(shape, dtype, f"{self.path.name}:{labels}", nbytes, tuple(infos), read)

    def _table_config(self) -> dict[str, Any]:
        """Return the config values that transformers' tables read from the metadata.

        The tables are only used by a function that reads a file. It parses the vocabulary entry by entry, which is
        slow, and uses only its length. So it reads a copy whose vocabulary is one string of that length.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            self._write_header_copy(path)
            values: dict[str, Any] = hf_gguf.load_gguf_checkpoint(path)["config"]
        values.pop("_model_name_or_path", None)
        return values

    def _write_header_copy(self, path: Path) -> None:
        """Write a GGUF file with the metadata of this one, and with empty tensors of the same names."""
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
    """The part of a module's interface that transformers' name table uses.

    With the model itself, transformers would build the table again for each submodule, which takes seconds for 30
    layers. Only the names in the whole model and in its base model are needed.
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
        f"{path}: transformers {transformers_version} can't read GGUF files of architecture {arch} ({error}).",
        "Use the checkpoint in its safetensors form.",
    )
