"""On-disk cache of reference logits: the predictions of a model's own code for windows of a text.

A file holds a header, float16 [T, V] and float64 [T], for the T scored tokens. The float16 numbers are the logits of
each token minus their maximum. The float64 numbers are the exact log probabilities of the target tokens. The relative
error of float16 is 1/2048: the logit of the most probable token is exact, and a probability of 5e-5 of the largest is
off by 0.4%. As a distribution, the stored logits are within 1e-6 nats of the model's.
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
from ...runtimes.cache_folder import cache_dir
from ...runtimes.measure.evaluate import log_softmax
from ...runtimes.measure.windows import Window

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...ir.weights import Weight
    from ..frontend.sources import ModelSource

# Increased whenever the file for the same windows of the same model changes.
_VERSION = 1
_HEADER = 512
_BLOCK = 1 << 22
_CHUNK = 16  # tokens that are converted at a time
# The share of the free memory that the model's weights may use while windows run one after another.
_SHARE = 0.5


class StoredReference:
    """A memory-mapped file of reference logits; see `llmc.runtimes.measure.evaluate.ReferencePredictions`."""

    def __init__(self, path: Path, windows: Sequence[Window], vocab_size: int) -> None:
        self.path, self.vocab_size = path, vocab_size
        self._ends = np.cumsum([len(window.targets) for window in windows])
        count = int(self._ends[-1])
        self._logits = np.memmap(path, np.float16, "r", _HEADER, (count, vocab_size))
        self._of_targets = np.fromfile(path, np.float64, count, offset=_HEADER + self._logits.nbytes)

    def window(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = slice(self._ends[index - 1] if index else 0, self._ends[index])
        return self._logits[tokens], self._of_targets[tokens]


def reference_of(
    model: str | ModelSource,
    windows: Sequence[Window],
    vocab_size: int,
    *,
    watch: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> StoredReference:
    """Return the model's own predictions for windows of a text, from the cache if it has them.

    Args:
        model: a folder, a GGUF file, a hub id, "demo", or a model that was already found.
        vocab_size: the vocabulary size of the artifact that will be compared.
        watch: called with "reference", the number of windows that are done and the number of all.

    Raises:
        LlmcError: REFERENCE_MISMATCH if the vocabularies differ; REFERENCE_DISK if the disk has too little space.
    """
    import torch

    from ..frontend.identity import identity
    from ..frontend.sources import find_source

    watch("reference", 0, 0)
    source = find_source(model) if isinstance(model, str) else model
    module = source.build(torch.float32)
    key = _key(identity(source, module), windows)
    path = cache_dir() / "references" / f"{key}.bin"
    count = sum(len(window.targets) for window in windows)
    header = {"key": key, "version": _VERSION, "tokens": count, "vocab_size": vocab_size}
    if not _is_whole(path, header):
        _check_space(path.parent, count * (2 * vocab_size + 8))
        _write(path, header, _logits(source, module, windows, vocab_size, watch))
    return StoredReference(path, windows, vocab_size)


def _key(identity: str, windows: Sequence[Window]) -> str:
    """Return the name of the file. The windows stand for text, tokenizer, window length and stride."""
    digest = hashlib.sha256(f"{_VERSION} {identity}".encode())
    for window in windows:
        digest.update(np.array([len(window.tokens), window.first, *window.tokens], "<i8").tobytes())
    return digest.hexdigest()


def _logits(
    source: ModelSource,
    module: nn.Module,
    windows: Sequence[Window],
    vocab_size: int,
    watch: Callable[[str, int, int], None],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the logits [N, V] and the targets [N] of each window."""
    import torch

    from ..frontend.eager import eager_logits

    known = getattr(source.config, "vocab_size", None) or vocab_size
    if largest := max((int(w.tokens.max()) for w in windows if w.tokens.max() >= known), default=0):
        raise _mismatch(source, f"knows {known} tokens, but the text contains token number {largest}")
    weights = keep_in_memory(source.weights(module))
    for done, window in enumerate(windows):
        watch("reference", done, len(windows))
        logits = eager_logits(module, weights, torch.from_numpy(window.tokens[None, :-1]))[0, window.first - 1 :]
        if logits.shape[1] != vocab_size:
            raise _mismatch(source, f"predicts {logits.shape[1]} tokens, the artifact {vocab_size} tokens")
        if torch.isnan(logits).any():
            what = f"{source.name} itself computes NaN logits."
            raise LlmcError("MODEL_NOT_FINITE", what, "Check the checkpoint's weights.")
        yield logits.numpy(), window.targets


def _mismatch(source: ModelSource, why: str) -> LlmcError:
    hint = "Set --reference to the model that the artifact was compiled from, or to another artifact of it."
    return LlmcError("REFERENCE_MISMATCH", f"{source.name} {why}.", hint)


def keep_in_memory(weights: Mapping[str, Weight]) -> Mapping[str, Weight]:
    """Return the same weights, but keep their values in memory after the first use while there is free memory."""
    from ...ir.weights import Weight

    remaining = _free_memory() * _SHARE

    class Kept(Weight):
        def __init__(self, weight: Weight) -> None:
            self.weight, self.value = weight, None

        def evaluate(self) -> Tensor:
            nonlocal remaining
            if self.value is not None:
                return self.value
            value: Any = self.weight.evaluate()
            if remaining >= value.nbytes:
                remaining -= value.nbytes
                self.value = value
            return value

    return {name: Kept(weight) for name, weight in weights.items()}


def _free_memory() -> int:
    """Return the free memory in bytes; 0 if it is unknown."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)


def _check_space(folder: Path, needed: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _no_space(f"{folder} can't be made: {error.strerror}") from None
    if free < needed:
        raise _no_space(f"they take {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free")


def _no_space(why: str) -> LlmcError:
    hint = "Set LLMC_CACHE to a folder on another disk, or set a smaller --max-tokens."
    return LlmcError("REFERENCE_DISK", f"The reference logits can't be stored: {why}.", hint)


def _write(path: Path, header: dict[str, Any], parts: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
    """Write a temporary file, its header last, and rename it: a file at `path` is always complete."""
    handle, name = tempfile.mkstemp(prefix="making-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            digest, of_targets = hashlib.sha256(), []
            file.write(bytes(_HEADER))
            for logits, targets in parts:
                for start in range(0, len(targets), _CHUNK):
                    chunk, ids = logits[start : start + _CHUNK], targets[start : start + _CHUNK]
                    of_targets.append(log_softmax(chunk)[np.arange(len(ids)), ids])
                    with np.errstate(over="ignore"):  # below -65504, a probability is 0 in any case
                        _append(file, digest, (chunk - chunk.max(1, keepdims=True)).astype(np.float16))
            _append(file, digest, np.concatenate(of_targets))
            file.seek(0)
            file.write(json.dumps(header | {"sha256": digest.hexdigest()}).encode().ljust(_HEADER))
        os.replace(name, path)
    except OSError as error:
        raise _no_space(error.strerror or str(error)) from error
    finally:
        Path(name).unlink(missing_ok=True)


def _append(file: BinaryIO, digest: Any, array: np.ndarray) -> None:
    file.write(array.data)
    digest.update(array.data)


def _is_whole(path: Path, header: dict[str, Any]) -> bool:
    """Return True if a file exists, has this header, and its content matches its checksum."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(_HEADER))
            digest = hashlib.sha256()
            while block := file.read(_BLOCK):
                digest.update(block)
    except (OSError, ValueError):
        return False
    return bool(found == header | {"sha256": digest.hexdigest()})
