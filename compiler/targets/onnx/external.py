"""The file that holds an artifact's weights: streamed tensor by tensor, equal bytes once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from onnx import TensorProto

from ....ir.weights import Weight, rows_of

# Of a page, so that the file can be mapped and a tensor read without a copy; small ones need no more than a cache line.
PAGE, LINE = 4096, 64
_SMALL = 1 << 20


@dataclass(frozen=True)
class DataLocation:
    """Where a tensor's bytes are."""

    file: str
    offset: int
    length: int


def external_tensor(name: str, dtype: int, shape: Sequence[int], place: DataLocation) -> TensorProto:
    """An initializer whose bytes are elsewhere; `dtype` by its number in ONNX."""
    tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", place.file), ("offset", place.offset), ("length", place.length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


class ExternalData:
    """Writes weights one behind the other; a value that is there already is written no second time.

    Args:
        watch: called with a weight's name before it is computed.
    """

    def __init__(self, path: Path, watch: Callable[[str], None] = lambda name: None) -> None:
        self.path = path
        self.watch = watch
        self._by_key: dict[str, DataLocation] = {}
        self._by_content: dict[bytes, DataLocation] = {}
        self._file: IO[bytes] | None = None

    def add(self, name: str, weight: Weight) -> DataLocation:
        """The place of a weight, which is computed and written if its value is new. Rows of a weight lie in it."""
        if part := rows_of(weight):
            whole, first = part
            place = self.add(name, whole)
            return DataLocation(place.file, place.offset + first * (place.length // whole.shape[0]), weight.nbytes)
        if weight.key not in self._by_key:
            self.watch(name)
            value = weight.evaluate().contiguous()
            content = value.view(-1).view(torch.uint8).numpy().data
            self._by_key[weight.key] = self._write(content)
        return self._by_key[weight.key]

    def _write(self, content: memoryview) -> DataLocation:
        digest = hashlib.sha256(content).digest()
        if digest not in self._by_content:
            if self._file is None:
                self._file = self.path.open("wb")
            alignment = LINE if content.nbytes < _SMALL else PAGE
            self._file.write(bytes(-self._file.tell() % alignment))
            self._by_content[digest] = DataLocation(self.path.name, self._file.tell(), content.nbytes)
            self._file.write(content)
        return self._by_content[digest]

    def __enter__(self) -> ExternalData:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
