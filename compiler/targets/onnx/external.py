"""Write the data file of an artifact: one weight after another, equal bytes once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from onnx import TensorProto

from ....ir.weights import Weight, dim0_slice_of

# Alignment in bytes. Large tensors start at a page, so that the mapped file can be used without copies. Small ones
# start at a cache line.
PAGE, LINE = 4096, 64
_SMALL = 1 << 20


@dataclass(frozen=True)
class DataLocation:
    """The location of a tensor's bytes: a file, and offset and length in bytes."""

    file: str
    offset: int
    length: int


def external_tensor(name: str, dtype: int, shape: Sequence[int], place: DataLocation) -> TensorProto:
    """Return an initializer whose bytes are in another file.

    Args:
        dtype: the number of the ONNX element type.
    """
    tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", place.file), ("offset", place.offset), ("length", place.length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


class ExternalData:
    """Writes weights one after the other; equal values are written once.

    Args:
        watch: called with a weight's name before the weight is computed.
    """

    def __init__(self, path: Path, watch: Callable[[str], None] = lambda name: None) -> None:
        self.path = path
        self.watch = watch
        self._by_key: dict[str, DataLocation] = {}
        self._by_content: dict[bytes, DataLocation] = {}
        self._file: IO[bytes] | None = None

    def add(self, name: str, weight: Weight) -> DataLocation:
        """Return the location of a weight; compute and write it if its value is new.

        A slice of output channels is located within the whole weight, which is written instead.
        """
        if part := dim0_slice_of(weight):
            whole, start = part
            location = self.add(name, whole)
            channel_bytes = location.length // whole.shape[0]
            return DataLocation(location.file, location.offset + start * channel_bytes, weight.nbytes)
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

    def flush(self) -> None:
        """Make the bytes of all weights so far visible to readers of the file."""
        if self._file is not None:
            self._file.flush()

    def __enter__(self) -> ExternalData:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
