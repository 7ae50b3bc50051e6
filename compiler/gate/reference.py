"""The reference of the gate: logits of the model by its own code, for fixed sequences."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import LlmcError
from ...ir.nodes import value_of
from ...ir.program import Program
from ...runtimes.engines.selfcheck import GateReference
from ..frontend.eager import eager_logits
from ..frontend.sources import ModelSource

# Lengths of the prompts, and how many tokens follow each one by one.
PROMPTS = (7, 26, 70)
STEPS = 12
# If the model has a tokenizer, the prompts are pieces of this.
TEXT = (
    "A compiler reads a program that says what should happen and writes one that says how. In between it must not "
    "change the meaning, which is harder than it sounds: additions of numbers with a fixed number of digits are not "
    "associative, a table that is read may be written later, and the order in which two threads arrive is nobody's "
    "promise. So a careful compiler checks itself. It keeps the slow and simple program beside the fast one, feeds "
    "both the same questions, and compares the answers before it lets the fast one out of the door. Everything else, "
    "from the choice of registers to the last trick with the cache, is only worth having if that comparison holds."
)
# Entries of the vocabulary that are compared for each token: the most probable, and some spread over all.
TOP, SPREAD = 32, 32


def make_reference(
    source: ModelSource, module: nn.Module, program: Program, *, precision: str, rounded: Program | None = None
) -> GateReference:
    """Run the model on fixed sequences and keep some of its logits.

    Args:
        program: made from the model; its limits bound the sequences.
        precision: the key of the gate's limits.
        rounded: the program with the same quantized weights, keys and values, without caches; None if it is exact.

    Raises:
        LlmcError: MODEL_NOT_FINITE.
    """
    steps = min(STEPS, program.max_seq_len // 2)
    prompts = [min(size, program.max_seq_len - steps) for size in PROMPTS]
    tokens = _sequences(source, [size + steps for size in prompts], int(value_of(program.output).shape[-1]))
    logits = eager_logits(module, source.weights(module), tokens)
    if not torch.isfinite(logits).all():
        raise LlmcError(
            "MODEL_NOT_FINITE", "The model itself computes NaN or infinite logits.", "Check the checkpoint's weights."
        )
    ids = _compared_ids(logits)
    wanted = logits.gather(2, ids)
    del logits
    other = torch.zeros(0)
    if rounded is not None:
        positions = torch.arange(tokens.shape[1]).repeat(tokens.shape[0], 1)
        other = rounded(tokens, positions).gather(2, ids).float()
    return GateReference(
        precision=np.array(precision),
        tokens=tokens.numpy(),
        prompts=np.array(prompts),
        steps=np.array(steps),
        ids=ids.numpy(),
        logits=wanted.numpy(),
        rounded=other.numpy(),
    )


def _sequences(source: ModelSource, lengths: list[int], vocab_size: int) -> Tensor:
    """Return sequences of these lengths, padded with zeros: English if there is a tokenizer, else random tokens."""
    try:
        text = torch.tensor(source.tokenizer()(TEXT)["input_ids"])
    except Exception:  # no tokenizer, or one that can't read English; each kind has errors of its own
        text = torch.randint(vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    text = text.repeat(1 + sum(lengths) // len(text))
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for i, piece in enumerate(text[: sum(lengths)].split(lengths)):
        tokens[i, : lengths[i]] = piece
    return tokens


def _compared_ids(logits: Tensor) -> Tensor:
    """Return the entries of the vocabulary to compare, [B, S, K], the most probable first."""
    vocab_size = logits.shape[2]
    top = logits.topk(min(TOP, vocab_size), dim=2).indices
    spread = torch.linspace(0, vocab_size - 1, min(SPREAD, vocab_size)).long()
    return torch.cat((top, spread.expand(*top.shape[:2], -1)), 2)
