"""The identity of a model: the same content has the same one, wherever it lies."""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor, nn

from ...runtimes.artifact.hashing import sha256_all
from .sources import ModelSource


def identity(source: ModelSource, module: nn.Module) -> str:
    """Return the hub's commit, or a hash of the model's files or tensors."""
    if source.files:
        if commit := re.search(r"/snapshots/([0-9a-f]{40})/", source.files[0].as_posix()):
            return f"commit:{commit.group(1)}"
        digests = zip(source.files, sha256_all(source.files), strict=True)
        return "sha256:" + _combined([f"{path.name} {digest}" for path, digest in digests])
    tensors = sorted(source.weights(module).items())
    return "sha256:" + _combined([f"{name} {_digest(weight.evaluate())}" for name, weight in tensors])


def _combined(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
