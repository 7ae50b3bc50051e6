"""What a model gives by its own code for windows of a text, computed once and kept on disk.

The file is a header, float16 [T, V], and float64 [T], for the T tokens that are scored: their rows of log
probabilities, less the largest of each row, and the exact log probability of the token that came. float16 holds such a
number to one part in 2048 of it: exact where a row is largest, and off by 0.4% where the probability is 5e-5 of that.
Taken as a distribution again that is within 1e-6 nats of the model's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ...errors import LlmcError
from ...runtimes.measure.evaluate import log_softmax
from ...runtimes.measure.windows import Window
from ..frontend.demo import cache_dir

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...ir.weights import Weight
    from ..frontend.sources import ModelSource

# Raised whenever the same windows of the same model would give another file.
_VERSION = 1
_HEADER = 512
_BLOCK = 1 << 22
_ROWS = 16
# Of the memory that is free: what the model's weights may take while windows are run one after the other.
_SHARE = 0.5


class StoredReference:
    """A file of references, mapped; see `llmc.runtimes.measure.evaluate.Reference`."""

    def __init__(self, path: Path, windows: Sequence[Window], vocab_size: int) -> None:
        self.path, self.vocab_size = path, vocab_size
        self._ends = np.cumsum([len(window.targets) for window in windows])
        count = int(self._ends[-1])
        self._rows = np.memmap(path, np.float16, "r", _HEADER, (count, vocab_size))
        self._truth = np.fromfile(path, np.float64, count, offset=_HEADER + self._rows.nbytes)

    def window(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rows = slice(self._ends[index - 1] if index else 0, self._ends[index])
        return self._rows[rows], self._truth[rows]


def reference_of(
    model: str | ModelSource,
    windows: Sequence[Window],
    vocab_size: int,
    *,
    watch: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> StoredReference:
    """The model's own predictions for windows of a text, from the cache where it holds them.

    Args:
        model: a folder, a GGUF file, a hub id or "demo", or one that was found already.
        vocab_size: of the artifact that it will be compared with.
        watch: told "reference", and how many windows are done.

    Raises:
        LlmcError: REFERENCE_MISMATCH for a model of another vocabulary; REFERENCE_DISK where the disk has no room.
    """
    import torch

    from ..frontend.sources import find_source
    from ..metadata_files import identity

    watch("reference", 0, 0)
    source = find_source(model) if isinstance(model, str) else model
    module = source.build(torch.float32)
    key = _key(identity(source, module), windows)
    path = cache_dir() / "references" / f"{key}.bin"
    count = sum(len(window.targets) for window in windows)
    header = {"key": key, "version": _VERSION, "tokens": count, "vocab_size": vocab_size}
    if not _is_whole(path, header):
        _check_room(path.parent, count * (2 * vocab_size + 8))
        _write(path, header, _rows(source, module, windows, vocab_size, watch))
    return StoredReference(path, windows, vocab_size)


def _key(identity: str, windows: Sequence[Window]) -> str:
    """Windows name text, tokenizer, window and stride, as far as they matter."""
    digest = hashlib.sha256(f"{_VERSION} {identity}".encode())
    for window in windows:
        digest.update(np.array([len(window.tokens), window.first, *window.tokens], "<i8").tobytes())
    return digest.hexdigest()


def _rows(
    source: ModelSource,
    module: nn.Module,
    windows: Sequence[Window],
    vocab_size: int,
    watch: Callable[[str, int, int], None],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Logits [N, V] of each window, and its targets [N]."""
    import torch

    from ..frontend.eager import eager_logits

    known = getattr(source.config, "vocab_size", None) or vocab_size
    if largest := max((int(w.tokens.max()) for w in windows if w.tokens.max() >= known), default=0):
        raise _mismatch(source, f"knows {known} tokens, and the text has number {largest}")
    weights = keep_in_memory(source.weights(module))
    for done, window in enumerate(windows):
        watch("reference", done, len(windows))
        logits = eager_logits(module, weights, torch.from_numpy(window.tokens[None, :-1]))[0, window.first - 1 :]
        if logits.shape[1] != vocab_size:
            raise _mismatch(source, f"predicts {logits.shape[1]} tokens, the artifact {vocab_size}")
        if torch.isnan(logits).any():
            what = f"{source.name} itself gives logits that are not a number."
            raise LlmcError("MODEL_NOT_FINITE", what, "Check the checkpoint's weights.")
        yield logits.numpy(), window.targets


def _mismatch(source: ModelSource, why: str) -> LlmcError:
    hint = "Give the model that the artifact was compiled from, or another artifact of it."
    return LlmcError("REFERENCE_MISMATCH", f"{source.name} {why}.", hint)


def keep_in_memory(weights: Mapping[str, Weight]) -> Mapping[str, Weight]:
    """The same weights, values of which stay in memory once they were read, as far as there is room."""
    from ...ir.weights import Weight

    room = _free_memory() * _SHARE

    class Kept(Weight):
        def __init__(self, weight: Weight) -> None:
            self.weight, self.value = weight, None

        def evaluate(self) -> Tensor:
            nonlocal room
            if self.value is not None:
                return self.value
            value: Any = self.weight.evaluate()
            if room >= value.nbytes:
                room -= value.nbytes
                self.value = value
            return value

    return {name: Kept(weight) for name, weight in weights.items()}


def _free_memory() -> int:
    """Bytes; 0 where the system tells it in no known way."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)


def _check_room(folder: Path, needed: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _no_room(f"{folder} can't be made: {error.strerror}") from None
    if free < needed:
        raise _no_room(f"the reference takes {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB left")


def _no_room(why: str) -> LlmcError:
    return LlmcError("REFERENCE_DISK", f"There is no room: {why}.", "Set LLMC_CACHE, or measure fewer --max-tokens.")


def _write(path: Path, header: dict[str, Any], parts: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
    """Beside its final place, with the header last, and renamed into it: a file of that name is whole."""
    handle, name = tempfile.mkstemp(prefix="making-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            digest, truth = hashlib.sha256(), []
            file.write(bytes(_HEADER))
            for logits, targets in parts:
                for start in range(0, len(targets), _ROWS):
                    rows, right = logits[start : start + _ROWS], targets[start : start + _ROWS]
                    truth.append(log_softmax(rows)[np.arange(len(right)), right])
                    with np.errstate(over="ignore"):  # below -65504 a probability is 0 in any case
                        _append(file, digest, (rows - rows.max(1, keepdims=True)).astype(np.float16))
            _append(file, digest, np.concatenate(truth))
            file.seek(0)
            file.write(json.dumps(header | {"sha256": digest.hexdigest()}).encode().ljust(_HEADER))
        os.replace(name, path)
    except OSError as error:
        raise _no_room(error.strerror or str(error)) from error
    finally:
        Path(name).unlink(missing_ok=True)


def _append(file: BinaryIO, digest: Any, array: np.ndarray) -> None:
    file.write(array.data)
    digest.update(array.data)


def _is_whole(path: Path, header: dict[str, Any]) -> bool:
    """Whether a file is there, is what the header says, and holds what was written."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(_HEADER))
            digest = hashlib.sha256()
            while block := file.read(_BLOCK):
                digest.update(block)
    except (OSError, ValueError):
        return False
    return bool(found == header | {"sha256": digest.hexdigest()})
