"""The weights of a GGUF file: where each value comes from, and which of them keep the codes of the file.

Q8_0 and Q4_0 blocks are groups of 32 inputs with one scale, so their codes are codes of the int8 and int4 schemes.
Every other block type is dequantized. Its weights carry the reason, which compilation reports.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from transformers.modeling_gguf_pytorch_utils import TensorProcessor

from ...ir.stored import OnlyNumbers, StoredCodes
from ...ir.weights import Leaf, Weight
from .gguf_blocks import KEPT_SCHEMES, PLAIN_DTYPES, codes_of, scales_of
from .gguf_header import GgufTensorInfo

ReadBytes = Callable[[GgufTensorInfo], np.ndarray]

_LAYER = re.compile(r"^blk\.\d+\.")


@dataclass(frozen=True)
class GgufSource:
    """A tensor made from the file each time that it is read: a parameter, or the codes or scales of one.

    Attributes:
        key: the file's name and the GGUF names of the tensors.
        nbytes: the bytes that it takes in the file.
        tensors: the entries of the file that it is made from.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    key: str
    nbytes: int
    tensors: tuple[GgufTensorInfo, ...]
    _read: Callable[[], torch.Tensor] = field(repr=False, compare=False)

    def __str__(self) -> str:
        return self.key

    def read(self) -> torch.Tensor:
        """Read the tensor, in transformers' layout."""
        return self._read()


def with_stored_codes(
    sources: Mapping[str, GgufSource], processor: TensorProcessor, read: ReadBytes
) -> dict[str, Weight]:
    """Return each parameter as a lazy weight, with the codes of the file where a scheme holds them.

    The codes of the embedding and the LM head are kept only if the matrix of some layer keeps its codes. Else a
    compilation without ``--quantize`` would turn an otherwise float model into a quantized one.

    Args:
        sources: the value of each parameter. Tied parameters have the same source and get the same weight.
        processor: transformers' object that undoes the layout of the model's family.
        read: reads the bytes of a tensor.
    """
    orders = _OutputOrders(processor)
    by_key = {source.key: source for source in sources.values()}
    weights = {key: _weight(source, orders, read) for key, source in by_key.items()}
    kept = [key for key, weight in weights.items() if isinstance(weight, StoredCodes)]
    if not any(_LAYER.match(by_key[key].tensors[0].name) for key in kept):
        for key in kept:
            kind = by_key[key].tensors[0].type.name
            reason = f"it is {kind}, but no matrix of a layer keeps Q8_0 or Q4_0 codes"
            weights[key] = OnlyNumbers(Leaf(by_key[key]), reason)
    return {name: weights[source.key] for name, source in sources.items()}


def _weight(source: GgufSource, orders: _OutputOrders, read: ReadBytes) -> Weight:
    kinds = {info.type for info in source.tensors} - PLAIN_DTYPES.keys()
    if not kinds:
        return Leaf(source)
    names = " and ".join(sorted(kind.name for kind in kinds))
    if not kinds <= KEPT_SCHEMES.keys():
        return OnlyNumbers(Leaf(source), f"no scheme holds codes of GGUF type {names}")
    if len(source.tensors) > 1 or len(source.shape) != 2:
        return OnlyNumbers(Leaf(source), f"its {names} codes are not those of one matrix")
    order = orders.of(source)
    if order is None:
        return OnlyNumbers(Leaf(source), f"the model family stores its {names} codes in another layout")
    return _stored_codes(source, order, read)


def _stored_codes(source: GgufSource, order: np.ndarray, read: ReadBytes) -> StoredCodes:
    (info,) = source.tensors
    outputs, inputs = source.shape
    block, block_bytes = GGML_QUANT_SIZES[info.type]
    groups = inputs // block
    channels = None if np.array_equal(order, np.arange(outputs)) else torch.from_numpy(order)

    def part(name: str, width: int, dtype: torch.dtype, decode: Callable[..., torch.Tensor], nbytes: int) -> Leaf:
        def read_part() -> torch.Tensor:
            value = decode(read(info), info.type, outputs)
            return value if channels is None else value.index_select(0, channels)

        return Leaf(GgufSource((outputs, width), dtype, f"{source.key}:{name}", nbytes, (info,), read_part))

    scale_bytes = 2 * outputs * groups
    is_packed = KEPT_SCHEMES[info.type] == "int4"
    codes = part(
        "codes",
        inputs // 2 if is_packed else inputs,
        torch.uint8 if is_packed else torch.int8,
        codes_of,
        outputs * groups * block_bytes - scale_bytes,
    )
    scales = part("scales", groups, torch.float32, scales_of, scale_bytes)
    return StoredCodes(codes, scales, None, KEPT_SCHEMES[info.type], block)


class _OutputOrders:
    """Finds out how a family's processor permutes the output channels of a matrix.

    The processor runs on matrices that hold the index of each output channel and of each input channel. No weight is
    read. Layers are alike, so each matrix of a layer is tried once for all layers.
    """

    def __init__(self, processor: TensorProcessor) -> None:
        self._processor = processor
        self._known: dict[tuple[str, tuple[int, ...]], np.ndarray | None] = {}

    def of(self, source: GgufSource) -> np.ndarray | None:
        """Return the stored channel of each output channel; None if the processor does more than permute them."""
        (info,) = source.tensors
        if info.shape != source.shape:
            return None
        known = _LAYER.sub("blk.0.", info.name), info.shape
        if known not in self._known:
            self._known[known] = self._order(known[0], *source.shape)
        return self._known[known]

    def _order(self, name: str, outputs: int, inputs: int) -> np.ndarray | None:
        shape = (outputs, inputs)
        by_output = np.broadcast_to(np.arange(outputs, dtype=np.int32)[:, None], shape)
        moved = self._process(name, by_output)
        if moved is by_output:
            return np.arange(outputs)
        if moved is None or moved.shape != shape or np.any(moved != moved[:, :1]):
            return None
        order = moved[:, 0].astype(np.int64)
        by_input = np.broadcast_to(np.arange(inputs, dtype=np.int32), shape)
        inputs_after = self._process(name, by_input)
        keeps_inputs = inputs_after is not None and np.array_equal(inputs_after, by_input)
        return order if keeps_inputs and np.array_equal(np.sort(order), np.arange(outputs)) else None

    def _process(self, name: str, indices: np.ndarray) -> np.ndarray | None:
        """Return what the processor makes of a matrix; None if it puts the values in place by itself."""
        done = self._processor.process(
            weights=indices, name=name, tensor_key_mapping={}, parsed_parameters={"tensors": {}}
        )
        return None if done.name is None else done.weights
